"""Grouped matrix product in plain JAX.

On accelerators `jax.lax.ragged_dot`. On CPUs that would do the work of all groups for every row, so
there a loop visits blocks of rows of one group each: see `blocks`.
"""

import functools

import jax
import jax.numpy as jnp

from effarch.kernels import platform, varying
from effarch.kernels.grouped_matmul import blocks, feed_forward


def grouped_matmul(x, w, group_sizes, *, aligned):
    """See `api.grouped_matmul`."""
    if platform.current() != "cpu":
        return _ragged(x, w, group_sizes)
    return _by_blocks(*varying.align([x, w, group_sizes]), aligned)


def grouped_feed_forward(x, w_in, w_out, group_sizes, activation, *, aligned):
    """See `api.grouped_feed_forward`; for CPUs."""
    return feed_forward.in_one_loop(x, w_in, w_out, group_sizes, activation, aligned)


def _ragged(x, w, group_sizes):
    in_use = jnp.arange(x.shape[0])[:, None] < jnp.sum(group_sizes)
    x = jnp.where(in_use, x, 0)  # not all lowerings write the rows past the last group
    y = jax.lax.ragged_dot(x, w, group_sizes, preferred_element_type=jnp.float32)
    return jnp.where(in_use, y, 0).astype(x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _by_blocks(x_MD, w_EDF, sizes_E, aligned):
    dtype, x_bits, w_bits = x_MD.dtype, blocks.bits(x_MD), blocks.bits(w_EDF)

    def visit(block, y_bits):
        w_DF = blocks.values(w_bits[block.e], dtype)
        y_RF = blocks.dot(blocks.read(x_bits, block, dtype), w_DF)
        return blocks.write(y_bits, y_RF.astype(dtype), block)

    start = jnp.zeros((x_MD.shape[0], w_EDF.shape[2]), x_bits.dtype)
    return blocks.values(blocks.over(visit, start, sizes_E, x_MD.shape[0], aligned), dtype)


def _by_blocks_fwd(x_MD, w_EDF, sizes_E, aligned):
    return _by_blocks(x_MD, w_EDF, sizes_E, aligned), (x_MD, w_EDF, sizes_E)


def _by_blocks_bwd(aligned, saved, g_MF):
    x_MD, w_EDF, sizes_E = saved
    dtype = x_MD.dtype
    x_bits, w_bits, g_bits = (blocks.bits(array) for array in (x_MD, w_EDF, g_MF))

    def visit(block, carry):
        dx_bits, dw_EDF = carry
        x_RD, g_RF = blocks.read(x_bits, block, dtype), blocks.read(g_bits, block, dtype)
        dx_RD = blocks.dot(g_RF, blocks.values(w_bits[block.e], dtype), axis=1)
        dw_EDF = dw_EDF.at[block.e].add(blocks.over_rows(x_RD, g_RF))
        return blocks.write(dx_bits, dx_RD.astype(dtype), block), dw_EDF

    start = (jnp.zeros_like(x_bits), jnp.zeros(w_EDF.shape, jnp.float32))
    dx_bits, dw_EDF = blocks.over(visit, start, sizes_E, x_MD.shape[0], aligned)
    return blocks.values(dx_bits, dtype), dw_EDF.astype(w_EDF.dtype), None


_by_blocks.defvjp(_by_blocks_fwd, _by_blocks_bwd)
