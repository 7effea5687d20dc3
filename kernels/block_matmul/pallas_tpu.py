"""The product of blocks on TPUs: bytes come from memory, and become bfloat16 beside the matrix unit.

a's scales lie along the lanes; a product with ones spreads them over their blocks, exactly.
Legend: J = blocks of a step of the contraction.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from effarch.kernels import dispatch, varying
from effarch.kernels.block_matmul import operands
from effarch.kernels.quantize import e4m3_bits

_LANES = 128
_LEAST_ROWS = 32
"""A tile of bytes."""
_HIGH, _WIDE, _DEEP = 512, 1024, 1024
"""The largest tile: rows of a, columns of b, a step of the contraction."""


def block_matmul(a, b, size, *, interpret=False):
    """See `reference.block_matmul`. `interpret` runs the kernel without a TPU: for tests."""
    dispatch.require("tpu", interpret)
    given = operands.read(a, b, size)
    (M, K), N = given.a_MK.shape, given.b_KN.shape[1]
    high, wide, deep = _tile(M, N, K, size)
    spread = jnp.asarray(np.kron(np.eye(deep // size), np.ones(size)), jnp.bfloat16)
    arrays = varying.align([given.a_MK, given.b_KN, given.scales_a_MJ.T, given.scales_b_JN, spread])
    multiply = _in_bfloat16 if given.is_exact else _block_by_block

    def kernel(a_ref, b_ref, scales_a_ref, scales_b_ref, spread_ref, y_ref):
        @pl.when(pl.program_id(2) == 0)
        def _():
            y_ref[...] = jnp.zeros_like(y_ref)

        values = (e4m3_bits.decode(ref[...]) for ref in (a_ref, b_ref))
        scales = (scales_a_ref[...], scales_b_ref[...])
        y_ref[...] += multiply(*values, *scales, spread_ref[...])

    return pl.pallas_call(
        kernel,
        out_shape=varying.shape_like((M, N), jnp.float32, arrays[0]),
        grid=(M // high, N // wide, K // deep),
        in_specs=[
            pl.BlockSpec((high, deep), lambda i, j, k: (i, k)),
            pl.BlockSpec((deep, wide), lambda i, j, k: (k, j)),
            pl.BlockSpec((deep // size, high), lambda i, j, k: (k, i)),
            pl.BlockSpec((deep // size, wide), lambda i, j, k: (k, j)),
            pl.BlockSpec((deep // size, deep), lambda i, j, k: (0, 0)),
        ],
        out_specs=pl.BlockSpec((high, wide), lambda i, j, k: (i, j)),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=48 * 2**20,
        ),
        interpret=interpret,
        name="block_matmul",
    )(*arrays)


def _in_bfloat16(a, b, scales_a_JM, scales_b_JN, spread):
    spread_a = _dot(scales_a_JM.astype(jnp.bfloat16), spread, 0, 0)
    blocks = b.reshape(scales_b_JN.shape[0], -1, b.shape[1]) * scales_b_JN[:, None]
    a, b = (a * spread_a).astype(jnp.bfloat16), blocks.reshape(b.shape).astype(jnp.bfloat16)
    return _dot(a, b, 1, 0)


def _block_by_block(a, b, scales_a_JM, scales_b_JN, spread):
    """Values of E4M3 are exact in bfloat16; the scales are not and follow the product."""
    del spread
    a, b, scales_a_MJ = a.astype(jnp.bfloat16), b.astype(jnp.bfloat16), scales_a_JM.T
    size = a.shape[1] // scales_a_MJ.shape[1]
    total = 0.0
    for j in range(scales_a_MJ.shape[1]):
        part = slice(j * size, (j + 1) * size)
        product = _dot(a[:, part], b[part], 1, 0)
        total += product * scales_a_MJ[:, j : j + 1] * scales_b_JN[j : j + 1]
    return total


def _dot(a, b, axis_a: int, axis_b: int):
    dims = (((axis_a,), (axis_b,)), ((), ()))
    return jax.lax.dot_general(a, b, dims, preferred_element_type=jnp.float32)


def _tile(M: int, N: int, K: int, size: int) -> tuple[int, int, int]:
    if M % _LANES and (M > _HIGH or M % _LEAST_ROWS):
        raise dispatch.Unsupported(f"{M} rows are not a multiple of {_LANES}, or of {_LEAST_ROWS}")
    if N % _LANES or K % _LANES:
        raise dispatch.Unsupported(f"{K} x {N} are not multiples of {_LANES}")
    whole = max(8 * size, _LANES)  # eight blocks: a tile of scales
    steps = [n for n in range(whole, _DEEP + 1, whole) if K % n == 0]
    if not steps and K > 2 * _DEEP:
        raise dispatch.Unsupported(
            f"a contraction of {K} does not divide into eight blocks of {size}"
        )
    high = M if M % _LANES else _largest(M, _HIGH)
    return high, _largest(N, _WIDE), max(steps, default=K)


def _largest(length: int, most: int) -> int:
    return max(n for n in range(_LANES, most + 1, _LANES) if length % n == 0)
