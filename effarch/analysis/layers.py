"""A model taken apart: its blocks one by one, what each adds to the stream, taps on its layers.

Everything here is for a model inside a trace (`nnx.merge` in a jitted function) and for evaluation.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator

import jax
from flax import nnx
from jaxtyping import Array, Float

from effarch.models import block as block_lib
from effarch.models import language_model, parameters
from effarch.models.context import Context
from effarch.models.layers import linear, quantizer
from effarch.quantization import matmul


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Passed:
    """The stream around one layer, each [B,T,D]."""

    before: Array
    between: Array
    """After the mixer; `after` where there is no feed-forward."""
    after: Array


def blocks(model: language_model.LanguageModel) -> list[block_lib.Block]:
    """The blocks in order, each with the arrays of its own layer."""
    found = {}
    for name, stacked in model.layers.items():
        graphdef, state = nnx.split(stacked)
        arrays = nnx.to_pure_dict(state)
        for index, number in enumerate(parameters.stack_layers(name)):
            own = jax.tree.map(lambda x, index=index: x[index], arrays)
            found[number] = nnx.merge(graphdef, own)
    return [found[number] for number in sorted(found)]


def context(batch: dict) -> Context:
    """The context in which a batch is evaluated."""
    return Context(segment_ids=batch["segment_ids"], positions=batch["positions"], train=False)


def through(block: block_lib.Block, x_BTD: Float[Array, "B T D"], ctx: Context) -> Passed:
    """The stream through one block."""
    quantizer.prepare(block, ctx)
    y, _, _ = block.mixer(block.mixer_residual.enter(x_BTD, ctx), ctx, None)
    between = block.mixer_residual.leave(x_BTD, y, ctx)
    if block.ffn is None:
        return Passed(x_BTD, between, between)
    y, _ = block.ffn(block.ffn_residual.enter(between, ctx), ctx)
    return Passed(x_BTD, between, block.ffn_residual.leave(between, y, ctx))


def passes(model: language_model.LanguageModel, batch: dict) -> list[Passed]:
    """The stream around every layer."""
    ctx, found = context(batch), []
    x_BTD = model.enter(batch["inputs"], ctx)
    for block in blocks(model):
        found.append(through(block, x_BTD, ctx))
        x_BTD = found[-1].after
    return found


@contextlib.contextmanager
def tapped(layer: linear.Linear, change: Callable[[Array], Array]) -> Iterator[None]:
    """Within, `change` has its way with what the layer reads."""
    quantized, structure = layer.quantizer, layer.structure
    if structure is not None:
        layer.structure = lambda x, dtype: structure(change(x), dtype)
    else:
        product = quantized or matmul.matmul
        layer.quantizer = lambda x, w, dtype: product(change(x), w, dtype=dtype)
    try:
        yield
    finally:
        layer.quantizer, layer.structure = quantized, structure
