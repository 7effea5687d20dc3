"""Skipping bad updates: a loss or gradient that is not finite, or a sudden spike of the gradient.

A skipped update changes neither parameters nor optimizer state; it is counted.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

AVERAGE_DECAY = 0.98
WARMUP = 50
"""Good updates before a spike can be told from the usual."""


class GuardState(NamedTuple):
    """Scalars beside the guarded optimizer's state."""

    inner: Any
    average: jax.Array
    """Running mean of the gradient norm of good updates."""
    good: jax.Array
    skipped: jax.Array
    skipped_in_a_row: jax.Array


def guard(
    inner: optax.GradientTransformation, *, spike_factor: float
) -> optax.GradientTransformationExtraArgs:
    """Wraps an optimizer; `update` also takes `loss` and `grad_norm` (float32 scalars).

    An update is bad if loss or gradient norm is not finite, or the norm is more than `spike_factor`
    times its running mean (0: never for that reason).
    """

    def init(params):
        zero = jnp.zeros((), jnp.int32)
        return GuardState(inner.init(params), jnp.zeros((), jnp.float32), zero, zero, zero)

    def update(grads, state, params=None, *, loss, grad_norm):
        ok = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        if spike_factor > 0:
            ok &= (state.good < WARMUP) | (grad_norm <= spike_factor * state.average)

        def apply(_):
            return inner.update(grads, state.inner, params)

        def skip(_):
            return jax.tree.map(jnp.zeros_like, grads), state.inner

        updates, inner_state = jax.lax.cond(ok, apply, skip, None)
        decay = jnp.where(state.good > 0, AVERAGE_DECAY, 0.0)
        average = jnp.where(ok, decay * state.average + (1 - decay) * grad_norm, state.average)
        good = ok.astype(jnp.int32)
        return updates, GuardState(
            inner=inner_state,
            average=average,
            good=state.good + good,
            skipped=state.skipped + 1 - good,
            skipped_in_a_row=(state.skipped_in_a_row + 1) * (1 - good),
        )

    return optax.GradientTransformationExtraArgs(init, update)
