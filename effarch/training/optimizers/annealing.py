"""Confidence-guided annealing, the last phase of quantized training: "OFQ", arXiv 2302.02210.

Weights that oscillate between two levels sit near the threshold of their rounding. In the phase only
those move; all others keep every bit, weight decay included:

    free = min over i of |n clip(w / s, -1, 1) - 1/2 - (i + 1/2)| <= reach,   i = -n ... n - 2

with s and n of StatsQ (`quantization.estimators.Stats`): s = 2 mean|w| of a row, n = 2^(bits - 1).
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float

from effarch.models import parameters


class State(NamedTuple):
    count: Array
    inner: Any


def confine(
    inner: optax.GradientTransformationExtraArgs,
    bits: Mapping[str, tuple[int, int]],
    *,
    start: int,
    reach: float,
) -> optax.GradientTransformationExtraArgs:
    """`inner`, of whose updates from step `start` on only those of free weights are left.

    bits: parameter path -> (bits, the dimension along which a row of its matrix lies).
    """
    inner = optax.with_extra_args_support(inner)

    def update(grads, state, params=None, **extra):
        updates, inner_state = inner.update(grads, state.inner, params, **extra)

        def one(key_path, update, param):
            path = parameters.path_of(key_path)
            if path not in bits:
                return update
            moves = free(param, *bits[path], reach) | (state.count < start)
            return jnp.where(moves, update, jnp.asarray(-0.0, update.dtype))

        updates = jax.tree_util.tree_map_with_path(one, updates, params)
        return updates, State(optax.safe_increment(state.count), inner_state)

    def init(params):
        return State(jnp.zeros((), jnp.int32), inner.init(params))

    return optax.GradientTransformationExtraArgs(init, update)


def free(w: Float[Array, "..."], bits: int, dim: int, reach: float) -> Bool[Array, "..."]:
    """Which weights lie within `reach` steps of a threshold between two levels."""
    w = w.astype(jnp.float32)
    scale = 2 * jnp.mean(jnp.abs(w), axis=dim, keepdims=True) + 1e-12
    levels = 2 ** (bits - 1)
    place = jnp.clip(w / scale, -1, 1 - 1e-6) * levels - 1
    nearest = jnp.clip(jnp.round(place), -levels, levels - 2)
    return jnp.abs(place - nearest) <= reach
