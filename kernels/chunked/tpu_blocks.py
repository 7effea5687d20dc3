"""What a grid step (batch row b, head group j, step n) of a recurrence's TPU kernel sees of its arrays.

`at(n)` is the chunk of step n. Legend as in `tpu_rows`.
"""

import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from effarch.kernels import varying
from effarch.kernels.chunked.tpu_rows import Plan

At = Callable


def tokens(plan: Plan, lanes: int, at: At) -> pl.BlockSpec:
    """[C, lanes] of an array [B,T,J*lanes]."""
    return pl.BlockSpec((None, plan.chunk, lanes), lambda b, j, n: (b, at(n), j))


def per_token(plan: Plan, rows: int, at: At) -> pl.BlockSpec:
    """[rows, C] of an array [B,N,J,rows,C]."""
    return pl.BlockSpec((None, None, None, rows, plan.chunk), lambda b, j, n: (b, at(n), j, 0, 0))


def sums(plan: Plan, array, at: At) -> pl.BlockSpec:
    """Summed decays: [rows, C] of [B,N,J,rows,C]; per channel [parts, C, HB*K] of [parts,B,T,HV*K]."""
    if not plan.per_channel:
        return per_token(plan, array.shape[3], at)
    shape = (array.shape[0], None, plan.chunk, plan.heads * plan.key)
    return pl.BlockSpec(shape, lambda b, j, n: (0, b, at(n), j))


def per_head(plan: Plan, rows: int, lanes: int, at: At) -> pl.BlockSpec:
    """[HB, rows, lanes] of an array [B,N,HV,rows,lanes]."""
    return pl.BlockSpec((None, None, plan.heads, rows, lanes), lambda b, j, n: (b, at(n), j, 0, 0))


def marks(plan: Plan, at: At) -> pl.BlockSpec:
    """[8, C] of an array [B,N,8,C]."""
    return pl.BlockSpec((None, None, 8, plan.chunk), lambda b, j, n: (b, at(n), 0, 0))


def state(plan: Plan) -> pl.BlockSpec:
    """[1, HB, K, V] of an array [B,HV,K,V], the same for all steps: it stays in fast memory."""
    return pl.BlockSpec((1, plan.heads, plan.key, plan.value), lambda b, j, n: (b, j, 0, 0))


def load_state(plan: Plan, source, target, row, group) -> None:
    """Copies a block of `state` from the array in slow memory."""
    pltpu.sync_copy(source.at[pl.ds(row, 1), pl.ds(group * plan.heads, plan.heads)], target)


def whole() -> pl.BlockSpec:
    """An array that stays in slow memory; a kernel copies what it wants."""
    return pl.BlockSpec(memory_space=pl.ANY)


def call(
    kernel: Callable,
    plan: Plan,
    grid: tuple[int, int, int],
    inputs: Sequence[tuple[pl.BlockSpec, jax.Array]],
    outputs: Sequence[tuple[pl.BlockSpec, Sequence[int], jnp.dtype]],
    *,
    flops: int,
    name: str,
    scratch: Sequence = (),
) -> list[jax.Array]:
    """Runs `kernel(plan, *refs)` for all rows, groups of heads (in any order) and steps (in order).

    The first input is q. `flops` are those of a token and value head, for XLA's schedule.
    """
    arrays = [array for _, array in inputs]
    shapes = [varying.shape_like(shape, dtype, arrays[0]) for _, shape, dtype in outputs]
    count = arrays[0].size // plan.key * plan.group
    moved = sum(math.prod(x.shape) * x.dtype.itemsize for x in (*arrays, *shapes))
    return pl.pallas_call(
        functools.partial(kernel, plan),
        grid=grid,
        in_specs=[spec for spec, _ in inputs],
        out_specs=[spec for spec, _, _ in outputs],
        out_shape=shapes,
        scratch_shapes=scratch,
        # Room for the blocks of 2048 lanes, twice.
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=60 * 2**20,
        ),
        cost_estimate=pl.CostEstimate(
            flops=count * flops, transcendentals=count * plan.chunk, bytes_accessed=moved
        ),
        interpret=plan.interpret,
        name=name,
    )(*arrays)
