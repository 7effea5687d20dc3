"""The product of blocks on GPUs, in Triton: bytes come from memory, and become bfloat16 in registers."""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from effarch.kernels import dispatch, varying
from effarch.kernels.block_matmul import operands
from effarch.kernels.quantize import e4m3_bits

_HIGH, _WIDE, _DEEP = 64, 64, 128
"""The largest tile: rows of a, columns of b, a step of the contraction."""
_LEAST = 16


def block_matmul(a, b, size, *, interpret=False):
    """See `reference.block_matmul`. `interpret` runs the kernel without a GPU: for tests."""
    dispatch.require("gpu", interpret)
    given = operands.read(a, b, size)
    (M, K), N = given.a_MK.shape, given.b_KN.shape[1]
    high, wide = (min(length & -length, most) for length, most in ((M, _HIGH), (N, _WIDE)))
    deep = min(K & -K, _DEEP) if given.is_exact else size
    if min(high, wide) < _LEAST or deep < max(size, 2 * _LEAST):
        raise dispatch.Unsupported(
            f"{M} x {K} by {K} x {N} does not divide into tiles of powers of two for blocks of {size}"
        )
    arrays = varying.align([given.a_MK, given.b_KN, given.scales_a_MJ, given.scales_b_JN])
    multiply = _in_bfloat16 if given.is_exact else _one_block
    blocks = deep // size

    def kernel(a_ref, b_ref, scales_a_ref, scales_b_ref, y_ref):
        def step(k, total):
            part, own = pl.ds(k * deep, deep), pl.ds(k * blocks, blocks)
            values = e4m3_bits.decode(a_ref[:, part]), e4m3_bits.decode(b_ref[part, :])
            return total + multiply(*values, scales_a_ref[:, own], scales_b_ref[own, :])

        zeros = jnp.zeros((high, wide), jnp.float32)
        y_ref[...] = jax.lax.fori_loop(jnp.int32(0), jnp.int32(K // deep), step, zeros)

    return pl.pallas_call(
        kernel,
        out_shape=varying.shape_like((M, N), jnp.float32, arrays[0]),
        grid=(M // high, N // wide),
        in_specs=[
            pl.BlockSpec((high, K), lambda i, j: (i, 0)),
            pl.BlockSpec((K, wide), lambda i, j: (0, j)),
            pl.BlockSpec((high, K // size), lambda i, j: (i, 0)),
            pl.BlockSpec((K // size, wide), lambda i, j: (0, j)),
        ],
        out_specs=pl.BlockSpec((high, wide), lambda i, j: (i, j)),
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=2),
        interpret=interpret,
        name="block_matmul",
    )(*arrays)


def _in_bfloat16(a, b, scales_a, scales_b):
    blocks_a = a.reshape(a.shape[0], scales_a.shape[1], -1) * scales_a[:, :, None]
    blocks_b = b.reshape(scales_b.shape[0], -1, b.shape[1]) * scales_b[:, None, :]
    a, b = (x.reshape(y.shape).astype(jnp.bfloat16) for x, y in ((blocks_a, a), (blocks_b, b)))
    return jnp.dot(a, b, preferred_element_type=jnp.float32)


def _one_block(a, b, scale_a, scale_b):
    """Values of E4M3 are exact in bfloat16; the scales are not and follow the product."""
    product = jnp.dot(
        a.astype(jnp.bfloat16), b.astype(jnp.bfloat16), preferred_element_type=jnp.float32
    )
    return product * scale_a * scale_b
