"""Rotary position embedding: RoFormer, arXiv 2104.09864, in the half-split layout of Llama."""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


def rotate(
    x: Float[Array, "B T H K"],
    positions: Int[Array, "B T"],
    *,
    theta: float,
    fraction: float = 1.0,
    scaling: tuple[float, ...] = (),
) -> Float[Array, "B T H K"]:
    """Turns pair i of the first `fraction` of the K channels by positions * theta**(-2 i / width).

    `scaling`: see `stretched`.
    """
    width = int(x.shape[-1] * fraction)
    half = width // 2
    frequencies = theta ** (-jnp.arange(half, dtype=jnp.float32) * 2 / width)
    if scaling:
        exact = theta ** (-np.arange(half) * 2 / width)
        frequencies = jnp.asarray(stretched(exact, *scaling), jnp.float32)
    angle = positions[:, :, None, None].astype(jnp.float32) * frequencies
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    first, second = x[..., :half].astype(jnp.float32), x[..., half:width].astype(jnp.float32)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return jnp.concatenate([turned.astype(x.dtype), x[..., width:]], axis=-1)


def stretched(
    frequencies: np.ndarray, factor: float, low: float, high: float, length: float
) -> np.ndarray:
    """Frequencies for texts `factor` times as long as `length`: Llama 3.1, arXiv 2407.21783.

    Those that turn less than `low` times over `length` are divided by `factor`, those that turn more
    than `high` times stay, and between the two it is linear in the number of turns.
    """
    turns = length * frequencies / (2 * math.pi)
    kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return frequencies * (kept + (1 - kept) / factor)
