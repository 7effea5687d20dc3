"""One token of linear attention: the definition, shared by decoding and the reference."""

import jax
import jax.numpy as jnp


def linear_step(state, q, k, v, g, *, scale) -> tuple[jax.Array, jax.Array]:
    """S = exp(g) S + k v^T;  o = S^T (scale q), read after the write.

    state [B,HV,K,V], q and k [B,H,K], v [B,HV,V], g None, [B,HV] or [B,HV,K].
    Computes in the state's dtype and returns o [B,HV,V] and the new state in it.
    """
    dtype = state.dtype
    batch, heads, width = k.shape
    grouped = state.reshape(batch, heads, -1, width, state.shape[-1])
    q, k = ((x.astype(dtype))[:, :, None, :, None] for x in (q * scale, k))
    if g is not None:
        decay = jnp.exp(g.astype(dtype))
        grouped = grouped * decay.reshape(batch, heads, -1, width if g.ndim == 3 else 1, 1)
    grouped = grouped + k * v.astype(dtype).reshape(batch, heads, -1, 1, v.shape[-1])
    # Products and sums, not matrix products: exact float32 on every device.
    o = jnp.sum(grouped * q, axis=-2)
    return o.reshape(v.shape), grouped.reshape(state.shape)
