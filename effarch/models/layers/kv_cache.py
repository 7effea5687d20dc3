"""The decode cache of softmax attention: a ring of keys and values with their positions."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def init(batch: int, length: int, num_kv_heads: int, k_dim: int, v_dim: int, dtype) -> dict:
    """`length` empty slots a row; position -1 marks a slot as empty."""
    return {
        "k": jnp.zeros((batch, length, num_kv_heads, k_dim), dtype),
        "v": jnp.zeros((batch, length, num_kv_heads, v_dim), dtype),
        "positions": jnp.full((batch, length), -1, jnp.int32),
    }


def append(
    cache: dict,
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T G V"],
    positions: Int[Array, "B T"],
    valid: Bool[Array, "B T"],
) -> dict:
    """Writes token p of a row into slot p mod length; tokens that are not `valid` are dropped."""
    length = cache["positions"].shape[1]
    last = jnp.max(jnp.where(valid, positions, -1), axis=1, keepdims=True)
    kept = valid & (positions > last - length)  # two tokens of one write never share a slot
    slot = jnp.where(kept, positions % length, length)
    row = jnp.arange(k.shape[0])[:, None]
    return {
        "k": cache["k"].at[row, slot].set(k.astype(cache["k"].dtype), mode="drop"),
        "v": cache["v"].at[row, slot].set(v.astype(cache["v"].dtype), mode="drop"),
        "positions": cache["positions"].at[row, slot].set(positions, mode="drop"),
    }
