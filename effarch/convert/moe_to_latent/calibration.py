"""What enters the experts of a model: second moments over the tokens of some batches."""

from collections.abc import Iterable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from effarch.models import parameters
from effarch.models.context import Context
from effarch.models.ffns import moe

_NAME = "count/second_moment"


class _Watched(nnx.Module):
    """An ffn that also reports sum_t x_t x_t^T over tokens that are not padding."""

    def __init__(self, ffn: nnx.Module):
        self.ffn = ffn

    def __call__(self, x_BTD: Float[Array, "B T D"], ctx: Context):
        y_BTD, aux = self.ffn(x_BTD, ctx)
        x_BTD = jnp.where((ctx.segment_ids != 0)[..., None], x_BTD.astype(jnp.float32), 0.0)
        highest = jax.lax.Precision.HIGHEST
        return y_BTD, aux | {_NAME: jnp.einsum("btd,bte->de", x_BTD, x_BTD, precision=highest)}


def is_convertible(ffn: nnx.Module) -> bool:
    """Whether an ffn is a plain mixture of experts."""
    return type(ffn) is moe.Moe


def second_moments(
    model, batches: Iterable[Mapping[str, np.ndarray]]
) -> dict[int, Float[np.ndarray, "D D"]]:
    """E[x x^T] of what enters the experts, by layer; batches as the train step takes them."""
    watched = nnx.merge(*nnx.split(model))
    for block in watched.layers.values():
        if is_convertible(block.ffn):
            block.ffn = _Watched(block.ffn)
    graphdef, state = nnx.split(watched)

    @jax.jit
    def measure(state, batch):
        ctx = Context(segment_ids=batch["segment_ids"], positions=batch["positions"], train=False)
        _, _, aux = nnx.merge(graphdef, state)(batch["inputs"], ctx)
        return {stack: found[_NAME] for stack, found in aux.items() if _NAME in found}

    sums: dict[int, np.ndarray] = {}
    tokens = 0
    for batch in batches:
        tokens += int(np.sum(batch["segment_ids"] != 0))
        for stack, moments in jax.device_get(measure(state, dict(batch))).items():
            for layer, moment in zip(parameters.stack_layers(stack), moments):
                sums[layer] = sums.get(layer, 0.0) + moment.astype(np.float64)
    if not tokens:
        raise ValueError("calibrate: the batches hold no tokens; give a corpus that does.")
    return {layer: total / tokens for layer, total in sums.items()}
