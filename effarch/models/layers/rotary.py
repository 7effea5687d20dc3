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
    yarn: tuple[float, ...] = (),
) -> Float[Array, "B T H K"]:
    """Turns pair i of the first `fraction` of the K channels by positions * theta**(-2 i / width).

    `scaling`: see `stretched`; `yarn`: the first four numbers of `yarn_stretched`.
    """
    width = int(x.shape[-1] * fraction)
    half = width // 2
    frequencies = theta ** (-jnp.arange(half, dtype=jnp.float32) * 2 / width)
    if scaling:
        exact = theta ** (-np.arange(half) * 2 / width)
        frequencies = jnp.asarray(stretched(exact, *scaling), jnp.float32)
    if yarn:
        frequencies = jnp.asarray(yarn_stretched(theta, width, *yarn), jnp.float32)
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


def yarn_stretched(
    theta: float, width: int, factor: float, fast: float, slow: float, length: float
) -> np.ndarray:
    """Frequencies of the pairs for texts `factor` times as long as `length`: YaRN, arXiv 2309.00071.

    Pairs that turn more than `fast` times over `length` stay, those that turn less than `slow` times are
    divided by `factor`, and between the two it is linear in the number of the pair.
    """

    def pair(turns: float) -> float:
        return width * math.log(length / (2 * math.pi * turns)) / (2 * math.log(theta))

    first, last = max(math.floor(pair(fast)), 0), min(math.ceil(pair(slow)), width - 1)
    number = np.arange(width // 2)
    divided = np.clip((number - first) / max(last - first, 1e-3), 0.0, 1.0)
    return theta ** (-number * 2 / width) * (1 - divided + divided / factor)


def yarn_sharpness(factor: float, scale: float) -> float:
    """What YaRN multiplies attention's scores by: (0.1 scale ln(factor) + 1)^2."""
    return (0.1 * scale * math.log(factor) + 1) ** 2
