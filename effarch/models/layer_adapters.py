"""Which linear layers have a low-rank adapter, by public path, and what then is trained."""

from collections.abc import Callable, Mapping, Sequence

from flax import nnx

from effarch import names
from effarch.models.layer_language import Layer, Run
from effarch.models.layers import adapter

TRAINED = ("** frozen=1", "layers/**/adapter/** frozen=0")
"""Optimizer rules that leave the adapters alone to be trained; they come before the config's."""


def assign(
    options, runs: Sequence[Run], makers: Mapping[Layer, Callable[[nnx.Rngs], nnx.Module]]
) -> dict[int, tuple[str, ...]]:
    """Layer number -> paths within its block. `options` is `config.model.lora`.

    Raises ValueError for a pattern that matches no linear layer.
    """
    return match(options.paths if options.rank else (), "model.lora.paths", runs, makers)


def match(
    patterns: Sequence[str],
    field: str,
    runs: Sequence[Run],
    makers: Mapping[Layer, Callable[[nnx.Rngs], nnx.Module]],
) -> dict[int, tuple[str, ...]]:
    """Layer number -> paths within its block of linear layers that a pattern of `field` matches."""
    layers = [layer for run in runs for layer in run.period * run.repeats]
    if not patterns:
        return dict.fromkeys(range(len(layers)), ())
    inside = {layer: _paths(make) for layer, make in makers.items()}
    paths = [
        (number, path, f"layers/{number}/{path}")
        for number, layer in enumerate(layers)
        for path in inside[layer]
    ]
    found: dict[int, set[str]] = {number: set() for number in range(len(layers))}
    for index, text in enumerate(patterns):
        pattern = names.glob(text)
        matched = [(number, path) for number, path, public in paths if pattern.fullmatch(public)]
        if not matched:
            known = ", ".join(sorted({path for _, path, _ in paths}))
            raise ValueError(
                f"{field}[{index}]: {text!r} matches no linear layer; write a pattern such as "
                f"'layers/*/mixer/**' for one of {known}."
            )
        for number, path in matched:
            found[number].add(path)
    return {number: tuple(sorted(paths)) for number, paths in found.items()}


def with_adapters(make: Callable[[nnx.Rngs], nnx.Module], paths: tuple[str, ...], options, dtype):
    """`make` followed by giving the block its adapters; its own parameters do not change."""

    def make_both(rngs: nnx.Rngs) -> nnx.Module:
        block = make(rngs)
        sizes = dict(rank=options.rank, alpha=options.alpha)
        adapter.attach(block, paths, param_dtype=dtype, rngs=rngs, **sizes)
        return block

    return make_both


def _paths(make) -> list[str]:
    return list(adapter.linear_layers(nnx.eval_shape(lambda: make(nnx.Rngs(0)))))
