"""One token of the delta rule: the definition, shared by decoding and the reference."""

import jax
import jax.numpy as jnp


def delta_step(state, q, k, v, beta, g, scale) -> tuple[jax.Array, jax.Array]:
    """S' = exp(g) S;  S = S' + k (beta (v - S'^T k))^T;  o = S^T (scale q), read after the write.

    state [B,HV,K,V], q and k [B,H,K], v [B,HV,V], beta [B,HV], g None, [B,HV] or [B,HV,K].
    Computes in the state's dtype and returns o [B,HV,V] and the new state in it.
    """
    dtype = state.dtype
    batch, heads, width = k.shape
    grouped = state.reshape(batch, heads, -1, width, state.shape[-1])
    q, k, v, beta = (x.astype(dtype) for x in (q * scale, k, v, beta))
    if g is not None:
        g = g.astype(dtype)
        decay = jnp.exp(g if g.ndim == 3 else g[..., None])
        grouped = grouped * decay.reshape(batch, heads, -1, decay.shape[-1], 1)
    # Products and sums, not matrix products: exact float32 on every device.
    old = jnp.sum(grouped * k[:, :, None, :, None], axis=-2).reshape(v.shape)
    new = (beta[..., None] * (v - old)).reshape(batch, heads, -1, 1, v.shape[-1])
    grouped = grouped + k[:, :, None, :, None] * new
    o = jnp.sum(grouped * q[:, :, None, :, None], axis=-2)
    return o.reshape(v.shape), grouped.reshape(state.shape)
