"""Softmax attention as it is defined: all scores at once in float32, plain autodiff.

Legend: R = query heads that share a key head (H = G * R).
"""

import jax
import jax.numpy as jnp


def attention(
    q,
    k,
    v,
    *,
    causal,
    window,
    softcap,
    segment_ids,
    kv_segment_ids,
    q_positions,
    kv_positions,
    scale,
) -> jax.Array:
    """See `api.attention`. Holds B * H * T * S scores."""
    B, T, H, K = q.shape
    S, G = k.shape[1:3]
    q_BTGRK = q.reshape(B, T, G, H // G, K).astype(jnp.float32)
    s_BGRTS = scale * jnp.einsum("btgrk,bsgk->bgrts", q_BTGRK, k.astype(jnp.float32))
    if softcap is not None:
        s_BGRTS = softcap * jnp.tanh(s_BGRTS / softcap)

    seen_BTS = jnp.ones((B, T, S), bool)
    if q_positions is None:
        q_positions = jnp.broadcast_to(jnp.arange(T), (B, T))
        kv_positions = jnp.broadcast_to(jnp.arange(S), (B, S))
    age_BTS = q_positions[:, :, None] - kv_positions[:, None, :]
    seen_BTS &= kv_positions[:, None, :] >= 0
    if causal:
        seen_BTS &= age_BTS >= 0
    if window is not None:
        seen_BTS &= age_BTS < window
    if segment_ids is not None:
        seen_BTS &= segment_ids[:, :, None] == kv_segment_ids[:, None, :]
        seen_BTS &= kv_segment_ids[:, None, :] != 0

    seen_BGRTS = seen_BTS[:, None, None]
    s_BGRTS = jnp.where(seen_BGRTS, s_BGRTS, -jnp.inf)
    peak = jax.lax.stop_gradient(jnp.max(s_BGRTS, axis=-1, keepdims=True))
    p_BGRTS = jnp.exp(s_BGRTS - jnp.where(jnp.isfinite(peak), peak, 0.0))
    total = jnp.sum(p_BGRTS, axis=-1, keepdims=True)
    p_BGRTS = p_BGRTS / jnp.where(total > 0, total, 1.0)
    o_BTGRV = jnp.einsum("bgrts,bsgv->btgrv", p_BGRTS, v.astype(jnp.float32))
    return o_BTGRV.reshape(B, T, H, v.shape[-1]).astype(q.dtype)
