"""AdamW with both moments in FP8: "COAT", arXiv 2410.19313, dynamic range expansion.

A group of 128 values is raised to the power that makes its range fill E4M3's:

    q = E4M3(448 sign(x) (|x| / hi)^k),   k = floor(16 log2(448^2 / 2) / log2(hi / lo)) / 16
    x = sign(q) hi (|q| / 448)^(1 / k)

hi and lo: the largest and the smallest nonzero magnitude. This is the published form with its
geometric centre and scale cancelled, so a group shares two numbers rather than three. Where we
differ: groups lie along the last dimension, zeros do not count for lo, and k is kept in [1/16, 64],
so that groups of equal values and of zeros are exact.
"""

from typing import Any

import jax.numpy as jnp
import optax
from jaxtyping import Array

from effarch.training.optimizers import stored_moments, updates

_LARGEST = 448.0
_RANGE = 448.0 * 448.0 / 2


def coat(
    schedule: optax.ScalarOrSchedule,
    *,
    b1: float = 0.9,
    b2: float = 0.95,
    eps: float = 1e-8,
    weight_decay: float = 0.1,
    group_size: int = 128,
    expand: bool = True,
    groups: Any,
) -> optax.GradientTransformation:
    """AdamW with 2 + 16 / group_size bytes of state a parameter rather than 8. `expand` False: k = 1."""
    updates.check_range("coat.b1", b1, 0, 1)
    updates.check_range("coat.b2", b2, 0, 1)
    updates.check_range("coat.weight_decay", weight_decay, 0)
    updates.check_range("coat.group_size", group_size, 1)
    moment = codec(group_size, expand)
    return updates.finish(
        {"coat": stored_moments.scale_by_adam(moment, moment, b1=b1, b2=b2, eps=eps)},
        lambda group: "coat",
        groups=groups,
        schedule=schedule,
        weight_decay=weight_decay,
    )


def codec(group_size: int, expand: bool) -> stored_moments.Codec:
    """E4M3 codes; a group shares (hi, k)."""

    def encode(x: Array) -> tuple[Array, Array]:
        size = jnp.abs(x)
        hi = jnp.max(size, axis=-1, keepdims=True)
        k = _power(size, hi) if expand else jnp.ones_like(hi)
        share = size / jnp.where(hi > 0, hi, 1.0)
        codes = jnp.minimum(_LARGEST * share**k, _LARGEST)
        return jnp.copysign(codes, x).astype(jnp.float8_e4m3fn), jnp.concatenate([hi, k], axis=-1)

    def decode(codes: Array, shared: Array) -> Array:
        hi, k = shared[..., :1], shared[..., 1:]
        values = codes.astype(jnp.float32)
        return jnp.copysign(hi * (jnp.abs(values) / _LARGEST) ** (1 / k), values)

    return stored_moments.Codec(encode, decode, group_size)


def _power(size: Array, hi: Array) -> Array:
    lo = jnp.min(jnp.where(size > 0, size, jnp.inf), axis=-1, keepdims=True)
    spread = jnp.log2(hi) - jnp.log2(lo)  # 0 for equal values; not finite for zeros
    k = jnp.floor(16 * jnp.log2(_RANGE) / jnp.maximum(spread, 1e-3)) / 16
    return jnp.where(hi > 0, jnp.clip(k, 1 / 16, 64.0), 1.0)
