"""E4M3 numbers as their bits, in integer arithmetic: for kernels on devices without such a type."""

import jax
import jax.numpy as jnp

_BIAS = 127 - 7  # of float32 beyond that of E4M3
_FRACTION = 23 - 3


def to_int8(codes: jax.Array) -> jax.Array:
    """float8_e4m3fn as int8 of the same bits."""
    return jax.lax.bitcast_convert_type(codes, jnp.int8)


def from_int8(bits: jax.Array) -> jax.Array:
    """The inverse of `to_int8`."""
    return jax.lax.bitcast_convert_type(bits, jnp.float8_e4m3fn)


def decode(bits: jax.Array) -> jax.Array:
    """float32 values of int8 bits; NaN is not known."""
    wide = bits.astype(jnp.int32)
    size = wide & 0x7F
    normal = jax.lax.bitcast_convert_type((size << _FRACTION) + (_BIAS << 23), jnp.float32)
    magnitude = jnp.where(size < 8, size.astype(jnp.float32) * 2.0**-9, normal)
    return jnp.where(wide < 0, -magnitude, magnitude)


def encode(values: jax.Array) -> jax.Array:
    """int8 bits of float32 values that E4M3 holds; NaN is not known."""
    wide = jax.lax.bitcast_convert_type(values, jnp.int32)
    size = wide & 0x7FFFFFFF
    normal = (size >> _FRACTION) - (_BIAS << 3)
    small = (jnp.abs(values) * 2.0**9).astype(jnp.int32)
    code = jnp.where(size < (127 - 6) << 23, small, normal)
    return jnp.where(wide < 0, code - 128, code).astype(jnp.int8)
