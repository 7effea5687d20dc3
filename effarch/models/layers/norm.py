"""Normalization: RMSNorm and the L2 norm of keys and queries."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float


class RMSNorm(nnx.Module):
    """y = x / sqrt(mean(x^2) + eps) * scale, statistics in float32 (arXiv 1910.07467)."""

    def __init__(self, width: int, *, eps: float = 1e-6, param_dtype=jnp.float32):
        self.scale = nnx.Param(jnp.ones((width,), param_dtype), logical=("norm",))
        self.eps = eps

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        x32 = x.astype(jnp.float32)
        y = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.eps)
        return (y * self.scale[...]).astype(x.dtype)


def l2_normalize(x: Float[Array, "... K"], eps: float = 1e-6) -> Float[Array, "... K"]:
    """x / sqrt(sum(x^2) + eps) in float32: unit keys make a delta-rule write an exact erase."""
    x32 = x.astype(jnp.float32)
    y = x32 * jax.lax.rsqrt(jnp.sum(x32 * x32, axis=-1, keepdims=True) + eps)
    return y.astype(x.dtype)
