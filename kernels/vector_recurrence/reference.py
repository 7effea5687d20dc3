"""The elementwise recurrence token by token, as it is written."""

import jax.numpy as jnp

from effarch.kernels import token_by_token


def vector_recurrence(x, g, *, initial_state=None, segment_ids=None):
    """See `api.vector_recurrence`."""
    dtype = jnp.result_type(jnp.float32, x)
    if initial_state is None:
        initial_state = jnp.zeros((x.shape[0], x.shape[2]), dtype)

    def token(h, x, g):
        h = jnp.exp(g.astype(dtype)) * h + x.astype(dtype)
        return h, h

    h, final = token_by_token.run(token, (x, g), initial_state.astype(dtype), segment_ids)
    return h.astype(x.dtype), final
