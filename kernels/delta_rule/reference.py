"""The delta rule token by token: slow, plain, and the definition of what the other backends compute."""

import jax
import jax.numpy as jnp

from effarch.kernels import varying
from effarch.kernels.delta_rule import step


def gated_delta_rule(
    q, k, v, beta, g=None, *, scale, initial_state=None, segment_ids=None, chunk_size=None
):
    """See `api.gated_delta_rule`; `chunk_size` changes nothing here."""
    del chunk_size
    dtype = jnp.result_type(jnp.float32, q, k, v, beta)
    batch, length = q.shape[:2]
    if initial_state is None:
        initial_state = jnp.zeros((batch, v.shape[2], q.shape[3], v.shape[3]), dtype)
    if segment_ids is None:
        segment_ids = jnp.ones((batch, length), jnp.int32)
    inputs = varying.align([q, k, v, beta, g, segment_ids, initial_state.astype(dtype)])
    *tokens, state = inputs
    by_time = [None if x is None else jnp.moveaxis(x, 1, 0) for x in tokens]

    def token(carry, inputs):
        state, document = carry
        q, k, v, beta, g, segment = inputs
        is_real = segment != 0
        is_new = is_real & (document != 0) & (segment != document)
        before = jnp.where(is_new[:, None, None, None], 0, state)
        o, after = step.delta_step(before, q.astype(dtype), k, v, beta, g, scale)
        state = jnp.where(is_real[:, None, None, None], after, state)
        document = jnp.where(is_real, segment, document)
        return (state, document), jnp.where(is_real[:, None, None], o, 0)

    no_document = jnp.zeros_like(tokens[-1][:, 0])
    (final, _), o = jax.lax.scan(token, (state, no_document), tuple(by_time))
    return jnp.moveaxis(o, 0, 1).astype(v.dtype), final
