"""What the kernels of both platforms read: E4M3 bits in bytes and float32 scales, K in blocks.

Legend: J = blocks of the contraction.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from effarch.kernels import dispatch
from effarch.kernels.block_matmul import api
from effarch.kernels.quantize import e4m3_bits, formats
from effarch.kernels.quantize.api import QuantizedArray

_ELEMENTS = ("e4m3", "e2m1")
_SIZES = (16, 32, 64, 128)


class Operands(NamedTuple):
    a_MK: jax.Array
    b_KN: jax.Array
    scales_a_MJ: jax.Array
    scales_b_JN: jax.Array
    is_exact: bool
    """Whether elements times scales are multiplied in bfloat16, rather than blocks one by one."""


def read(a: QuantizedArray, b: QuantizedArray, size: int) -> Operands:
    """Raises `Unsupported` for formats that the kernels do not take."""
    if a.codes.shape[0] > api.MOST_ROWS:
        raise dispatch.Unsupported(
            f"with {a.codes.shape[0]} rows, more than {api.MOST_ROWS}, it is faster to take the blocks "
            "apart once"
        )
    for x in (a, b):
        if x.format.element.name not in _ELEMENTS:
            raise dispatch.Unsupported(f"elements are {x.format.element.name}, not e4m3 or e2m1")
    is_exact = api.is_exact_in_bfloat16(a) and api.is_exact_in_bfloat16(b)
    if size not in _SIZES or (not is_exact and size < 32):
        raise dispatch.Unsupported(f"blocks of {size} are none of its sizes")
    scales_b = b.scales.astype(jnp.float32)
    if 1 in dict(b.axes):
        scales_b = jnp.repeat(scales_b, size, axis=1)
    return Operands(_bits(a), _bits(b), a.scales.astype(jnp.float32), scales_b, is_exact)


def _bits(x: QuantizedArray) -> jax.Array:
    """E2M1 has no value that E4M3 lacks."""
    codes = x.codes
    if x.format.element.name != "e4m3":
        codes = formats.decode(codes, x.format.element).astype(jnp.float8_e4m3fn)
    return e4m3_bits.to_int8(codes)
