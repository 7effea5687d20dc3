"""Linear attention token by token: slow, plain, and the definition for the other backends."""

import functools

import jax.numpy as jnp

from effarch.kernels import token_by_token
from effarch.kernels.linear_attention import step


def linear_attention(
    q, k, v, g=None, *, scale, initial_state=None, segment_ids=None, chunk_size=None
):
    """See `api.linear_attention`; `chunk_size` changes nothing here."""
    del chunk_size
    dtype = jnp.result_type(jnp.float32, q, k, v)
    if initial_state is None:
        initial_state = jnp.zeros((q.shape[0], v.shape[2], q.shape[3], v.shape[3]), dtype)
    token = functools.partial(step.linear_step, scale=scale)
    tokens = (q.astype(dtype), k, v, g)
    o, final = token_by_token.run(token, tokens, initial_state.astype(dtype), segment_ids)
    return o.astype(v.dtype), final
