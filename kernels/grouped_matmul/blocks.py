"""Loops over blocks of rows of one group each: how CPUs multiply groups.

A loop visits the blocks that groups fill, so work is in proportion to the rows, whatever the number of
groups. A block has a fixed number of rows; where its group ends earlier, the rest are read as zeros and
not written, so rows need no padding, and the last of them are not multiplied (`trimmed`). A block and
the matrix of its group lie in the cache together.

XLA for CPUs does not slice bfloat16: it makes whole arrays float32 before a loop and rounds every block
inside, which takes several times as long as the product. Bits, as integers, are sliced as they are.

Legend: M = rows, E = groups, R = rows of a block.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from effarch.kernels import varying
from effarch.kernels.grouped_matmul import rows

_MOST = 160
"""Rows of a block: they share a cache of two MiB with a 256 x 256 matrix and its gradient."""


class Block(NamedTuple):
    """R consecutive rows, of which the group `e` owns some."""

    e: Int[Array, ""]
    start: Int[Array, ""]
    used: Int[Array, ""]
    """From which row on none is its own."""
    is_own_R1: Bool[Array, "R 1"]


def over(function: Callable, carry, sizes_E: jax.Array, num_rows: int, aligned: int):
    """Runs carry = function(block, carry) over the blocks that groups fill, in order."""
    E, R = sizes_E.shape[0], _rows_of_block(num_rows, sizes_E.shape[0], aligned)
    num_E, ends_E = -(-sizes_E // R), jnp.cumsum(sizes_E)
    group_J = rows.group_of_rows(num_E, num_rows // R + E)
    starts_E, firsts_E = ends_E - sizes_E, jnp.cumsum(num_E) - num_E
    *leaves, _ = varying.align([*jax.tree.leaves(carry), sizes_E])
    carry = jax.tree.unflatten(jax.tree.structure(carry), leaves)

    def visit(j, carry):
        e = group_J[j]
        row = starts_E[e] + (j - firsts_E[e]) * R
        start = jnp.minimum(row, num_rows - R)
        row_R = start + jnp.arange(R)
        end = jnp.minimum(row + R, ends_E[e])
        is_own_R = (row_R >= row) & (row_R < end)
        return function(Block(e, start, end - start, is_own_R[:, None]), carry)

    return jax.lax.fori_loop(0, jnp.sum(num_E), visit, carry)


def _rows_of_block(num_rows: int, num_groups: int, aligned: int) -> int:
    """What groups have that an even choice fills, with two deviations, in even pieces of at most _MOST.

    Groups that the caller made multiples of `aligned` rows are cut evenly.
    """
    mean = num_rows / num_groups
    size = aligned if aligned > 1 else math.ceil(mean + 2 * mean**0.5)
    size = -(-size // -(-size // _MOST))
    return min(-(-size // 8) * 8, num_rows)


def bits(x: jax.Array) -> jax.Array:
    """What can be sliced in a loop: bfloat16 as integers, other types as they are."""
    return jax.lax.bitcast_convert_type(x, jnp.uint16) if x.dtype == jnp.bfloat16 else x


def values(x_bits: jax.Array, dtype) -> jax.Array:
    """The numbers of type `dtype` that `bits` was given."""
    return jax.lax.bitcast_convert_type(x_bits, dtype) if x_bits.dtype == jnp.uint16 else x_bits


def read(x_bits: jax.Array, block: Block, dtype) -> jax.Array:
    """The rows of a block, [R, ...]; zeros where they are another group's."""
    x_RD = jax.lax.dynamic_slice_in_dim(x_bits, block.start, block.is_own_R1.shape[0])
    return values(jnp.where(block.is_own_R1, x_RD, jnp.zeros_like(x_RD)), dtype)


def write(y_bits: jax.Array, y_RF: jax.Array, block: Block) -> jax.Array:
    """The bits of y with a block's own rows replaced."""
    before_RF = jax.lax.dynamic_slice_in_dim(y_bits, block.start, y_RF.shape[0])
    after_RF = jnp.where(block.is_own_R1, bits(y_RF), before_RF)
    return jax.lax.dynamic_update_slice_in_dim(y_bits, after_RF, block.start, 0)


def trimmed(function: Callable, block: Block, *arrays_RD: jax.Array):
    """function(*arrays) on as many of the rows as the block needs: half, 3/4, 7/8 or all of them.

    `function` returns (rows [R, ...], other arrays), where rows of zeros add nothing to the others and
    become zeros.
    """
    R = block.is_own_R1.shape[0]
    sizes = sorted({min(-(-R * eighths // 64) * 8, R) for eighths in (4, 6, 7, 8)})

    def on(size):
        def run(*arrays):
            rows_RD, others = function(*(array[:size] for array in arrays))
            return jnp.pad(rows_RD, ((0, R - size), (0, 0))), others

        return run

    place = sum((block.used > size).astype(jnp.int32) for size in sizes[:-1])
    return jax.lax.switch(place, [on(size) for size in sizes], *arrays_RD)


def dot(a: jax.Array, b: jax.Array, axis: int = 0) -> jax.Array:
    """a times b, contracted over axis `axis` of b, in float32."""
    return jax.lax.dot_general(
        a, b, (((1,), (axis,)), ((), ())), preferred_element_type=jnp.float32
    )


def over_rows(a_RD: jax.Array, b_RF: jax.Array) -> jax.Array:
    """a^T b in float32.

    XLA multiplies bfloat16 as such if the rows are two axes; if they are one, as float32.
    """
    R = a_RD.shape[0]
    lead = (4, R // 4) if a_RD.dtype == jnp.bfloat16 and R % 4 == 0 else (R,)
    a, b = a_RD.reshape(*lead, -1), b_RF.reshape(*lead, -1)
    axes = tuple(range(len(lead)))
    return jax.lax.dot_general(a, b, ((axes, axes), ((), ())), preferred_element_type=jnp.float32)
