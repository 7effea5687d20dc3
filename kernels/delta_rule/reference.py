"""The delta rule token by token: slow, plain, and the definition of what the other backends compute."""

import functools

import jax.numpy as jnp

from effarch.kernels import token_by_token
from effarch.kernels.delta_rule import step


def gated_delta_rule(
    q, k, v, beta, g=None, *, scale, initial_state=None, segment_ids=None, chunk_size=None
):
    """See `api.gated_delta_rule`; `chunk_size` changes nothing here."""
    del chunk_size
    dtype = jnp.result_type(jnp.float32, q, k, v, beta)
    if initial_state is None:
        initial_state = jnp.zeros((q.shape[0], v.shape[2], q.shape[3], v.shape[3]), dtype)
    token = functools.partial(step.delta_step, scale=scale)
    tokens = (q.astype(dtype), k, v, beta, g)
    o, final = token_by_token.run(token, tokens, initial_state.astype(dtype), segment_ids)
    return o.astype(v.dtype), final
