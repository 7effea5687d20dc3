"""Normalization: RMSNorm, and the L2 norm and the sum of keys and queries."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from effarch.quantization import saved


class RMSNorm(nnx.Module):
    """y = x / sqrt(mean(x^2) + eps) * scale, statistics in float32 (arXiv 1910.07467)."""

    saved_group = 0
    """Above 0 the backward pass has x as FP8 copies in such groups; given by the builder."""

    def __init__(self, width: int, *, eps: float = 1e-6, param_dtype=jnp.float32):
        self.scale = nnx.Param(jnp.ones((width,), param_dtype), logical=("norm",))
        self.eps = eps

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        function = functools.partial(_normed, self.eps)
        if self.saved_group:
            return saved.small(function, self.saved_group, (x,), (self.scale[...],))
        return function(x, self.scale[...])


def _normed(eps: float, x: Array, scale: Array) -> Array:
    x32 = x.astype(jnp.float32)
    y = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    return (y * scale).astype(x.dtype)


def l2_normalize(x: Float[Array, "... K"], eps: float = 1e-6) -> Float[Array, "... K"]:
    """x / sqrt(sum(x^2) + eps) in float32: unit keys make a delta-rule write an exact erase."""
    x32 = x.astype(jnp.float32)
    y = x32 * jax.lax.rsqrt(jnp.sum(x32 * x32, axis=-1, keepdims=True) + eps)
    return y.astype(x.dtype)


def sum_normalize(x: Float[Array, "... K"], eps: float = 1e-4) -> Float[Array, "... K"]:
    """x / (sum(x) + eps) in float32, for channels that are not negative."""
    x32 = x.astype(jnp.float32)
    return (x32 / (jnp.sum(x32, axis=-1, keepdims=True) + eps)).astype(x.dtype)
