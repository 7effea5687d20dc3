"""Which linear layers are factored, by public path, and giving them their factors and guides."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import jax
from flax import nnx

from effarch.models import layer_adapters
from effarch.models.layer_language import Layer, Run
from effarch.models.layers import adapter, guide, linear, structures


@dataclasses.dataclass(frozen=True)
class Options:
    """As `config.model.structured` has them."""

    form: str
    rank: int
    blocks: int
    density: float
    scale: float
    guided_steps: int
    reduce_flops: bool


def assign(
    options, runs: Sequence[Run], makers: Mapping[Layer, Callable[[nnx.Rngs], nnx.Module]]
) -> dict[int, tuple[str, ...]]:
    """Layer number -> paths within its block. `options` is `config.model.structured`.

    Raises ValueError for a pattern that matches no linear layer.
    """
    patterns = () if options.form == "none" else options.paths
    return layer_adapters.match(patterns, "model.structured.paths", runs, makers)


def with_structures(make: Callable[[nnx.Rngs], nnx.Module], paths: tuple[str, ...], options):
    """`make` followed by factoring these layers of the block."""
    if not paths:
        return make

    def make_both(rngs: nnx.Rngs) -> nnx.Module:
        block = make(rngs)
        layers = adapter.linear_layers(block)
        for path in paths:
            try:
                attach(layers[path], options, rngs)
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from None
        return block

    return make_both


def attach(layer: linear.Linear, options, rngs: nnx.Rngs) -> None:
    """Factors in place of the layer's matrix, with `guided_steps` a guide beside them."""
    if layer.by_outputs or layer.structure is not None:
        why = "reads its matrix row by row" if layer.by_outputs else "is factored already"
        raise ValueError(f"structured: the layer {why}; leave it out of model.structured.paths.")
    dtype, layer.structure = layer.kernel.dtype, structures.make(layer, options, rngs)
    del layer.kernel
    if options.guided_steps:
        start = layer.structure.matrix().astype(dtype)
        layer.guide = guide.Guide(
            layer, start, steps=options.guided_steps, reduce_flops=options.reduce_flops
        )


def merge(model: nnx.Module) -> None:
    """Every factored layer becomes a dense one with the product of its factors; guides are dropped.

    For decoding a few tokens at a time, where one matrix is faster than two.
    """
    for layer in adapter.linear_layers(model).values():
        if layer.structure is None:
            continue
        graphdef, state = nnx.split(layer.structure)
        is_stacked = layer.structure.down.get_metadata("logical")[0] == "layers"
        matrix = lambda state, graphdef=graphdef: nnx.merge(graphdef, state).matrix()  # noqa: E731
        kernel = (jax.vmap(matrix) if is_stacked else matrix)(state)
        logical = ("layers", *layer.axes) if is_stacked else layer.axes
        kernel = kernel.astype(layer.structure.down.dtype)
        layer.kernel = nnx.Param(kernel, logical=logical, units=layer.units)
        del layer.structure
        if layer.guide is not None:
            del layer.guide
