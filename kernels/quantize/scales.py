"""Scales of blocks: powers of two, E4M3 values with a tensor scale, plain float32.

Everything in float32. A division by a constant in bfloat16 can pick the wrong power of two, and so can
log2 near one: exponents are read from the bits.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from effarch.kernels.quantize import rounding
from effarch.kernels.quantize.formats import ELEMENTS, Format

TINY = 2.0**-126
"""The smallest normal float32: XLA flushes what is below, so scales stop here (E8M0 at 2^-127)."""
_LARGEST = 2.0**126  # its inverse is still a normal number; larger values saturate
_SQRT2_MANTISSA = 0x3504F4  # the first above sqrt(2)


def exponent(x: jax.Array, mode: str = "floor") -> jax.Array:
    """floor, ceil or nearest integer of log2(x), exact; int32. Zero and subnormals give -127."""
    bits = jax.lax.bitcast_convert_type(jnp.asarray(x, jnp.float32), jnp.int32)
    mantissa = bits & 0x7FFFFF
    above = {"floor": 0, "ceil": mantissa > 0, "nearest": mantissa >= _SQRT2_MANTISSA}[mode]
    whole = (bits >> 23 & 0xFF) - 127
    return jnp.where(whole == -127, -127, whole + above)


def power_of_two(exponent: jax.Array) -> jax.Array:
    """2^exponent as float32 for exponents clipped to -126 ... 127, built from its bits."""
    clipped = jnp.clip(exponent, -126, 127).astype(jnp.int32)
    return jax.lax.bitcast_convert_type((clipped + 127) << 23, jnp.float32)


def of_tensor(largest: jax.Array, fmt: Format) -> jax.Array:
    """The tensor scale of a format with E4M3 scales, float32, from the largest magnitude of all."""
    room = ELEMENTS["e4m3"].max * fmt.element.max
    largest = jnp.minimum(largest, _LARGEST)
    return jnp.where(largest == 0, 1.0, jnp.maximum(largest / room, TINY))


def of_blocks(
    amax: jax.Array,
    fmt: Format,
    shrink: float,
    tensor: jax.Array | None = None,
    even: Callable[[jax.Array], jax.Array] = jnp.round,
) -> tuple[jax.Array, jax.Array | np.float32]:
    """(block scale, tensor scale): x is about element * block scale * tensor scale.

    `amax` holds each block's largest magnitude; `shrink` is 1 or the format's headroom; `tensor` is
    `of_tensor`'s if `amax` holds but a part of the blocks. A block of zeros has a scale that is not
    zero, one with a NaN has a NaN, and an infinite amax counts as the largest float32. `even`: as in
    `rounding.nearest`.
    """
    amax = jnp.minimum(amax, _LARGEST)
    largest = fmt.element.max
    if fmt.scale == "float32":
        scale = jnp.where(amax == 0, 1.0, jnp.maximum(amax / (largest * shrink), TINY))
        return scale, np.float32(1)
    if fmt.scale == "e8m0":
        if fmt.scale_rounding == "floor":
            raw = exponent(jnp.maximum(amax, TINY)) - fmt.element.emax
        else:
            raw = exponent(jnp.maximum(amax / largest, TINY), fmt.scale_rounding)
        return jnp.where(jnp.isnan(amax), amax, power_of_two(raw)), np.float32(1 / shrink)
    tensor = of_tensor(jnp.max(amax), fmt) if tensor is None else tensor
    top = ELEMENTS["e4m3"].max
    share = jnp.minimum(amax / (largest * shrink) / tensor, top)
    block = rounding.nearest(share, ELEMENTS["e4m3"], even=even)
    return jnp.where(block == 0, 1.0, block), tensor
