"""What a grid step (batch row b, head group j, step n) of a recurrence's TPU kernel sees of its arrays.

`at(n)` is the chunk of step n. Legend as in `tpu_rows`.
"""

from collections.abc import Callable

from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

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


def compiler_params() -> pltpu.CompilerParams:
    """Steps in order; rows and groups of heads in any. Room for the blocks of 2048 lanes, twice."""
    return pltpu.CompilerParams(
        dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=60 * 2**20
    )
