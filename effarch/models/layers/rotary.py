"""Rotary position embedding: RoFormer, arXiv 2104.09864, in the half-split layout of Llama."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def rotate(
    x: Float[Array, "B T H K"], positions: Int[Array, "B T"], *, theta: float, fraction: float = 1.0
) -> Float[Array, "B T H K"]:
    """Turns pair i of the first `fraction` of the K channels by positions * theta**(-2 i / width)."""
    width = int(x.shape[-1] * fraction)
    half = width // 2
    frequencies = theta ** (-jnp.arange(half, dtype=jnp.float32) * 2 / width)
    angle = positions[:, :, None, None].astype(jnp.float32) * frequencies
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    first, second = x[..., :half].astype(jnp.float32), x[..., half:width].astype(jnp.float32)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return jnp.concatenate([turned.astype(x.dtype), x[..., width:]], axis=-1)
