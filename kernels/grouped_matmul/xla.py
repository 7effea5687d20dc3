"""Grouped matrix product in plain JAX.

On accelerators `jax.lax.ragged_dot`. On CPUs that would do the work of all groups for every row, so
there rows are padded to blocks of one group each, and a loop over the blocks in use multiplies each by
its matrix: work in proportion to the rows, whatever the number of groups.

Legend: J = blocks, R = rows of a block.
"""

import functools

import jax
import jax.numpy as jnp

from effarch.kernels import platform, varying
from effarch.kernels.grouped_matmul import api, rows


def grouped_matmul(x, w, group_sizes, *, aligned):
    """See `api.grouped_matmul`."""
    if platform.current() != "cpu":
        return _ragged(x, w, group_sizes)
    if aligned > 1:
        return _in_blocks(x, w, group_sizes, aligned)
    M, E = x.shape[0], w.shape[0]
    block = api.alignment(M, E)
    padded_E = -(-group_sizes // block) * block
    to_padded, to_rows = _padding(group_sizes, padded_E, M, block)
    y = _in_blocks(rows.take(x, to_rows, to_padded), w, padded_E, block)
    return rows.take(y, to_padded, to_rows)


def _ragged(x, w, group_sizes):
    in_use = jnp.arange(x.shape[0])[:, None] < jnp.sum(group_sizes)
    x = jnp.where(in_use, x, 0)  # not all lowerings write the rows past the last group
    y = jax.lax.ragged_dot(x, w, group_sizes, preferred_element_type=jnp.float32)
    return jnp.where(in_use, y, 0).astype(x.dtype)


def _padding(group_sizes, padded_E, M: int, block: int):
    """Where each row goes [M], and which row each padded row takes; out of range is none."""
    E = group_sizes.shape[0]
    num_padded = -(-(M + min(E, M) * (block - 1)) // block) * block
    starts_E, padded_starts_E = _starts(group_sizes), _starts(padded_E)
    rows_M, padded_N = jnp.arange(M), jnp.arange(num_padded)
    group_M = rows.group_of_rows(group_sizes, M)
    to_padded = rows_M + rows.gather(padded_starts_E - starts_E, group_M)
    to_padded = jnp.where(group_M < E, to_padded, num_padded)
    group_N = rows.group_of_rows(padded_E, num_padded)
    offset_N = padded_N - rows.gather(padded_starts_E, group_N)
    to_rows = jnp.where(
        offset_N < rows.gather(group_sizes, group_N), offset_N + rows.gather(starts_E, group_N), M
    )
    return to_padded, to_rows


def _starts(sizes):
    return jnp.cumsum(sizes) - sizes


def _in_blocks(x, w, sizes_E, R):
    """In float32: bfloat16 products in a loop are several times slower on CPUs.

    The barriers keep the compiler from moving the conversions into the loop.
    """
    wide = jax.lax.optimization_barrier((x.astype(jnp.float32), w.astype(jnp.float32)))
    return _blocks(*varying.align([*wide, sizes_E]), R).astype(x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _blocks(x_MD, w_EDF, sizes_E, R):
    def block(j, e, y_MF):
        return _put_rows(y_MF, _rows(x_MD, j, R) @ w_EDF[e], j, R)

    start = jnp.zeros((x_MD.shape[0], w_EDF.shape[2]), x_MD.dtype)
    return _over_blocks(block, start, x_MD, sizes_E, R)


def _blocks_fwd(x_MD, w_EDF, sizes_E, R):
    return _blocks(x_MD, w_EDF, sizes_E, R), (x_MD, w_EDF, sizes_E)


def _blocks_bwd(R, saved, g_MF):
    x_MD, w_EDF, sizes_E = saved
    g_MF = jax.lax.optimization_barrier(g_MF)

    def block(j, e, carry):
        dx_MD, dw_EDF = carry
        x_RD, g_RF = _rows(x_MD, j, R), _rows(g_MF, j, R)
        return _put_rows(dx_MD, g_RF @ w_EDF[e].T, j, R), dw_EDF.at[e].add(x_RD.T @ g_RF)

    start = (jnp.zeros_like(x_MD), jnp.zeros_like(w_EDF))
    return *_over_blocks(block, start, g_MF, sizes_E, R), None


_blocks.defvjp(_blocks_fwd, _blocks_bwd)


def _over_blocks(function, carry, like, sizes_E, R):
    """Runs carry = function(block, its group, carry) over the blocks that groups fill."""
    num_E = sizes_E // R
    group_J = rows.group_of_rows(num_E, like.shape[0] // R)
    *leaves, _ = varying.align([*jax.tree.leaves(carry), like])
    carry = jax.tree.unflatten(jax.tree.structure(carry), leaves)
    return jax.lax.fori_loop(0, jnp.sum(num_E), lambda j, c: function(j, group_J[j], c), carry)


def _rows(x_MD, j, R):
    return jax.lax.dynamic_slice_in_dim(x_MD, j * R, R)


def _put_rows(y_MF, y_RF, j, R):
    return jax.lax.dynamic_update_slice_in_dim(y_MF, y_RF, j * R, 0)
