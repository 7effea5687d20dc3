"""A recurrence as it is written down, one token after the other: what the references run."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from effarch.kernels import varying


def run(
    step: Callable[..., tuple[jax.Array, jax.Array]],
    tokens: Sequence[jax.Array | None],
    state: jax.Array,
    segment_ids: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """All outputs [B,T,...] and the state after the last token that is not padding.

    `step(state, *token) -> (output, state)`; tokens are arrays [B,T,...] or None. `state` belongs to
    the first document of each row, later ones start from zero; padding gives 0 and keeps the state.
    """
    if segment_ids is None:
        segment_ids = jnp.ones(tokens[0].shape[:2], jnp.int32)
    *tokens, segment_ids, state = varying.align([*tokens, segment_ids, state])
    by_time = [None if x is None else jnp.moveaxis(x, 1, 0) for x in (segment_ids, *tokens)]

    def where(condition_B, x, y):
        return jnp.where(condition_B.reshape(-1, *(1,) * (x.ndim - 1)), x, y)

    def token(carry, inputs):
        state, document = carry
        segment, *token = inputs
        is_real = segment != 0
        is_new = is_real & (document != 0) & (segment != document)
        output, after = step(where(is_new, jnp.zeros_like(state), state), *token)
        state = where(is_real, after, state)
        document = jnp.where(is_real, segment, document)
        return (state, document), where(is_real, output, jnp.zeros_like(output))

    no_document = jnp.zeros_like(segment_ids[:, 0])
    (final, _), outputs = jax.lax.scan(token, (state, no_document), by_time)
    return jnp.moveaxis(outputs, 0, 1), final
