"""A moment in FP8: each group is raised to the power that makes its range fill E4M3's.

    q = E4M3(448 sign(x) (|x| / hi)^k),   k = floor(16 log2(448^2 / 2) / log2(hi / lo)) / 16
    x = sign(q) hi (|q| / 448)^(1 / k)

hi and lo: the largest and the smallest nonzero magnitude. This is the form of "COAT", arXiv 2410.19313,
with its geometric centre and scale cancelled, so a group shares two numbers rather than three. Where we
differ: groups lie along the last dimension, zeros do not count for lo, and k is kept in [1/16, 64], so
that groups of equal values and of zeros are exact.
"""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

LARGEST = 448.0
_RANGE_LOG2 = math.log2(LARGEST * LARGEST / 2)


def encode(x: Array, expand: bool) -> tuple[Array, Array]:
    """(E4M3 codes, shared [..., 2]) of groups [..., size]."""
    hi, k = measure(x, expand)
    return compress(x, hi, k).astype(jnp.float8_e4m3fn), jnp.concatenate([hi, k], axis=-1)


def decode(codes: Array, shared: Array) -> Array:
    """The inverse of `encode`, float32."""
    return restore(codes.astype(jnp.float32), shared[..., :1], shared[..., 1:])


def measure(x: Array, expand: bool) -> tuple[Array, Array]:
    """hi and k of groups along the last dimension, which is kept."""
    size = jnp.abs(x)
    hi = jnp.max(size, axis=-1, keepdims=True)
    if not expand:
        return hi, jnp.ones_like(hi)
    lo = jnp.min(jnp.where(size > 0, size, jnp.inf), axis=-1, keepdims=True)
    spread = jnp.log2(hi) - jnp.log2(lo)  # 0 for equal values; not finite for zeros
    k = jnp.floor(16 * _RANGE_LOG2 / jnp.maximum(spread, 1e-3)) / 16
    return hi, jnp.where(hi > 0, jnp.clip(k, 1 / 16, 64.0), 1.0)


def compress(x: Array, hi: Array, k: Array) -> Array:
    """What is rounded to E4M3."""
    share = jnp.abs(x) * (1 / jnp.where(hi > 0, hi, 1.0))
    return jnp.copysign(jnp.minimum(LARGEST * _power(share, k), LARGEST), x)


def restore(values: Array, hi: Array, k: Array) -> Array:
    """The inverse of `compress`."""
    return jnp.copysign(hi * _power(jnp.abs(values) * np.float32(1 / LARGEST), 1 / k), values)


def step(g: Array, m: Array, v: Array, start: tuple[Array, Array], rates: tuple) -> tuple:
    """(d, m, v) of Adam in float32; `start` are 1 / (1 - b^count)."""
    b1, b2, eps = rates
    m = b1 * m + (1 - b1) * g
    v = b2 * v + (1 - b2) * g * g
    return (m * start[0]) / (jnp.sqrt(v * start[1]) + eps), m, v


def grouped(x: Array, size: int) -> Array:
    """[..., D] -> [..., groups, size], padded with zeros."""
    x = x.reshape(1) if x.ndim == 0 else x
    size = min(size, x.shape[-1])
    padding = [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % size)]
    return jnp.pad(x, padding).reshape(*x.shape[:-1], -1, size)


def ungrouped(x: Array, shape: tuple[int, ...]) -> Array:
    """The inverse of `grouped` for an array of this shape."""
    flat = x.reshape(*x.shape[:-2], -1)
    return flat[..., : shape[-1]] if shape else flat.reshape(shape)


def _power(share: Array, k: Array) -> Array:
    """share^k for 0 <= share <= 1; 0 and 1 are exact."""
    return jnp.exp2(k * jnp.log2(share))
