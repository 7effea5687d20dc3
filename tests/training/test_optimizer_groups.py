"""Kinds of parameters by logical axes, and the parameter of a state array by its path."""

import pytest

from effarch.models import parameters
from effarch.training.optimizers import groups, state_paths


@pytest.mark.parametrize(
    ("logical", "kind", "dims"),
    [
        (("layers", "embed", "ffn"), "matrix", (1, 2)),
        (("embed", "ffn"), "matrix", (0, 1)),
        (("layers", "experts", "embed", "ffn"), "matrix", (2, 3)),
        (("layers", "embed", "experts", "ffn"), "matrix", (1, 3)),
        (("vocab", "embed"), "table", None),
        (("embed", "vocab"), "table", None),
        (("layers", "embed"), "vector", None),
        (("layers", "experts", "embed"), "vector", None),
        (("layers", "conv", "heads"), "vector", None),
        (("layers", None, "embed"), "vector", None),
        (("layers", "embed", "heads", "head_dim"), "vector", None),
        ((), "vector", None),
    ],
)
@pytest.mark.parametrize("decay", [True, False])
def test_kinds_come_from_logical_axes(logical, kind, dims, decay):
    path = "layers/0/w" if "layers" in logical else "w"
    info = parameters.ParamInfo(path, (path,), logical, (1,) * len(logical), decay)
    assert groups.assign({"w": info}) == {
        "w": groups.Group(path, kind, decay=float(decay), matrix_dims=dims)
    }


def test_matching_takes_the_longest_suffix():
    def info(path, *logical):
        return parameters.ParamInfo(path, (path,), logical, (4, 4), True)

    short, long = info("b/kernel", "embed", "ffn"), info("a/b/kernel", "ffn", "embed")
    infos = {i.path: i for i in (short, long)}
    axes = state_paths.logical_axes
    assert axes("0/mu/a/b/kernel", (4, 4), infos) == long.logical
    assert axes("0/mu/xa/b/kernel", (4, 4), infos) == short.logical
    assert axes("0/mu/a/b/kernel", (4,), infos) is None
    assert axes("0/mu/c/kernel", (4, 4), infos) is None
    assert axes("0/count", (), infos) is None
