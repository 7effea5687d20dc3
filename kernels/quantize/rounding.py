"""Rounding float32 to a grid by arithmetic on bits: to nearest, or stochastically.

A float with m bits of mantissa is spaced by ulp = 2^(max(floor(log2 |x|), emin) - m), so that x / ulp
is exact and its rounding to a whole number is the rounding of x. Values beyond the largest saturate.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from effarch.kernels.quantize.formats import Element, Integer

TIES = ("even", "zero", "away")


def nearest(
    x: jax.Array,
    element: Element,
    ties: str = "even",
    even: Callable[[jax.Array], jax.Array] = jnp.round,
) -> jax.Array:
    """The nearest value of the grid; a tie goes to the even code, toward zero or away from it.

    `even`: how to round to whole numbers, ties to even ones, where `jnp.round` cannot be had.
    """
    ulp, inverse = spacing(x, element)
    steps = x * inverse
    if ties == "even":
        whole = even(steps)
    else:
        low = jnp.floor(jnp.abs(steps))
        rest = jnp.abs(steps) - low
        up = rest > 0.5 if ties == "zero" else rest >= 0.5
        whole = jnp.copysign(low + up, steps)
    return jnp.clip(whole * ulp, -element.max, element.max)


def stochastic(x: jax.Array, element: Element, noise: jax.Array) -> jax.Array:
    """One of the two neighbours on the grid, the upper with P = (|x| - low) / (high - low).

    `noise` is uniform in [0, 1) of x's shape. What lies beyond the largest value saturates, and is
    then no longer x in the mean: scale with headroom.
    """
    ulp, inverse = spacing(x, element)
    steps = x * inverse
    whole = jnp.copysign(jnp.floor(jnp.abs(steps) + noise), steps)
    return jnp.clip(whole * ulp, -element.max, element.max)


def spacing(x: jax.Array, element: Element) -> tuple[jax.Array, jax.Array] | tuple[float, float]:
    """(ulp, 1 / ulp) of the grid around x, both powers of two."""
    if isinstance(element, Integer):
        return element.step, 1 / element.step
    bits = jax.lax.bitcast_convert_type(x, jnp.int32)
    # Past the largest binade the value saturates anyway; the limit keeps 1 / ulp a normal number.
    top, bottom = (element.emax + 127) << 23, (element.emin + 127) << 23
    power = jnp.clip(bits & 0x7F800000, bottom, top) - (element.mantissa_bits << 23)
    ulp = jax.lax.bitcast_convert_type(power, jnp.float32)
    inverse = jax.lax.bitcast_convert_type((254 << 23) - power, jnp.float32)
    return ulp, inverse


def round_even(x: jax.Array) -> jax.Array:
    """`jnp.round` bit for bit, from operations that Triton has."""
    low = jnp.floor(jnp.abs(x))
    rest = jnp.abs(x) - low
    is_odd = low - 2 * jnp.floor(low * 0.5) == 1
    return jnp.copysign(jnp.where((rest > 0.5) | ((rest == 0.5) & is_odd), low + 1, low), x)


def uniform(seed: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Noise for `stochastic` from two uint32 words: multiples of 2^-24 in [0, 1), float32.

    A hash of each element's index, two rounds of lowbias32 (C. Wellons, "Prospecting for hash
    functions"): a tenth of the operations of JAX's threefry, whose strength rounding does not need,
    and the same numbers however the array is sharded.
    """
    index = jnp.zeros(shape, jnp.uint32)
    for dim, size in enumerate(shape):
        index = index * size + jax.lax.broadcasted_iota(jnp.uint32, shape, dim)
    return noise(index, seed)


def noise(index: jax.Array, seed: Sequence[jax.Array]) -> jax.Array:
    """The noise of elements by their places in the whole array; uint32 or the same bits as int32."""
    hashed = mix(mix(index + seed[0]) ^ seed[1])
    return jax.lax.shift_right_logical(hashed, _like(8, index)).astype(jnp.int32).astype(
        jnp.float32
    ) * (2.0**-24)


def mix(x: jax.Array) -> jax.Array:
    """A bijection of 32 bits that changes about half of them for each bit of x; uint32 or int32."""
    for shift, factor in ((16, 0x21F0AAAD), (15, 0xD35A2D97)):
        x = (x ^ jax.lax.shift_right_logical(x, _like(shift, x))) * _like(factor, x)
    return x ^ jax.lax.shift_right_logical(x, _like(15, x))


def _like(number: int, x: jax.Array) -> np.ndarray:
    return np.uint32(number).astype(x.dtype)
