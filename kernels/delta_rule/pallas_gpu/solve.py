"""The triangular system of a chunk by blocks of 16 rows, on full 64 x 64 tiles.

    (I + L) = (I + D) (I + M)     D the diagonal blocks, X = (I + D)^-1, M = X (L - D)
    (I + L)^-1 = (I + M M) (I - M) X           since M^4 = 0 in four blocks

Powers of M above 3 never occur, so nothing blows up where keys are alike. X comes by substitution: row i
of all blocks at once is a vector of C numbers, and L_ij is read from memory by each lane for its own
block, so that no thread waits for another.
"""

import jax
import jax.numpy as jnp
from jax.experimental.pallas import triton as plgpu

from effarch.kernels.delta_rule.pallas_gpu import blocks
from effarch.kernels.delta_rule.pallas_gpu.blocks import dot

BLOCK = 16


def invert_diagonal_blocks(plan, lower, scratch, inverse) -> None:
    """Writes X, its blocks side by side, to the ref `inverse` [16,C]; `scratch` is a ref [C,16]."""
    row, column = blocks.positions(plan.chunk)
    on_diagonal = row // BLOCK == column // BLOCK
    lanes = column % BLOCK
    if (
        plan.interpret
    ):  # the interpreter writes back what the mask leaves out: beyond the end it is lost
        lanes = jnp.where(on_diagonal, lanes, BLOCK)
    plgpu.store(scratch.at[row, lanes], lower, mask=on_diagonal)
    blocks.barrier(plan)
    lane = jax.lax.broadcasted_iota(jnp.int32, (plan.chunk,), 0)
    first_row = lane // BLOCK * BLOCK
    solved = []
    for i in range(BLOCK):
        x = jnp.where(lane % BLOCK == i, 1.0, 0.0)
        for j in range(i):
            x -= scratch[first_row + i, j] * solved[j]
        inverse[i, :] = x.astype(inverse.dtype)
        solved.append(x)
    blocks.barrier(plan)


def operators(plan, lower, inverse) -> tuple[jax.Array, jax.Array, jax.Array]:
    """X, -M and M M, [C,C] in the dtype of the ref `inverse`."""
    row, column = blocks.positions(plan.chunk)
    block, other = row // BLOCK, column // BLOCK
    x = plgpu.load(inverse.at[row % BLOCK, column], mask=block == other, other=0.0)
    outside = jnp.where(block > other, lower, 0.0).astype(x.dtype)
    minus_m = -dot(x, outside).astype(x.dtype)
    return x, minus_m, dot(minus_m, minus_m).astype(x.dtype)


def solve(x, minus_m, square, right) -> jax.Array:
    """(I + L)^-1 right, float32; operands are rounded to the dtype of X before each product."""
    y = dot(x, right.astype(x.dtype))
    z = y + dot(minus_m, y.astype(x.dtype))
    return z + dot(square, z.astype(x.dtype))


def solve_transposed(x, minus_m, square, right) -> jax.Array:
    """(I + L)^-T right, float32."""
    y = right.astype(jnp.float32) + dot(square.T, right.astype(x.dtype))
    z = y + dot(minus_m.T, y.astype(x.dtype))
    return dot(x.T, z.astype(x.dtype))
