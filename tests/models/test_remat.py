"""What the policies keep, by what JAX says it saves, and names that are refused."""

import contextlib
import io
import re

import jax
import jax.ad_checkpoint
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from effarch import config
from effarch.models import build, remat
from effarch.models.context import Context

B, T, D, F = 2, 8, 16, 48


def saved(text: str) -> list[tuple[tuple[int, ...], str]]:
    """(shape, note) of what one block keeps for its backward pass beside its arguments."""
    m = config.default().model
    m.width, m.depth, m.layers = D, 1, "attention/glu"
    m.blocks.attention.num_heads, m.blocks.glu.hidden = 2, F
    (block,) = build.abstract(m, vocab_size=11).layers.values()
    graphdef, state = nnx.split(block)
    arrays = jax.tree.map(
        lambda x: jnp.ones(x.shape[1:], x.dtype), nnx.to_pure_dict(state)
    )  # without the axis of layers

    def run(arrays, x):
        return nnx.merge(graphdef, arrays)(x, Context())[0].sum()

    policy = remat.policy(text)
    run = run if policy is None else jax.checkpoint(run, policy=policy)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        jax.ad_checkpoint.print_saved_residuals(run, arrays, np.ones((B, T, D), np.float32))
    found = re.findall(r"^\w+\[([\d,]*)\] (.*)$", printed.getvalue(), re.MULTILINE)
    kept = [(shape, note) for shape, note in found if "argument" not in note]
    return [(tuple(int(n) for n in shape.split(",") if n), note) for shape, note in kept]


def test_names_keep_what_they_name():
    kept = saved("names:q,ffn_up,mixer_out")
    assert sorted(re.search(r"named '(\w+)'", note).group(1) for _, note in kept) == [
        "ffn_up",
        "mixer_out",
        "q",
    ]
    assert sorted(shape for shape, _ in kept) == [(B, T, 2, 8), (B, T, D), (B, T, F)]
    every = saved("names:" + ",".join(remat.NAMES))
    found = {re.search(r"named '(\w+)'", note).group(1) for _, note in every}
    # The last output no backward pass needs, and with the others kept no product either.
    assert found == set(remat.NAMES) - {"ffn_out", "product"}


def test_presets_keep_less_and_less():
    size = lambda text: sum(np.prod(shape) for shape, _ in saved(text))  # noqa: E731
    sizes = [size(text) for text in ("none", "selective", "full")]
    assert sizes[1] == 4 * B * T * D + 2 * B * T * F  # q, k, v, out; gate, up
    assert sizes[0] > 1.5 * sizes[1] and sizes[2] == 0


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("weights", "model.remat='weights' is not known. Known: dots, full, names:..."),
        ("names:q,ffn_pu", "Did you mean 'ffn_up'?"),
        ("name:q", "Did you mean 'names'?"),
    ],
)
def test_others_are_refused(text, words):
    with pytest.raises(ValueError) as error:
        remat.policy(text)
    assert words in str(error.value)


def test_cpus_keep_offloaded_names_where_they_are():
    assert len(saved("offload:q,k")) == 2
