"""What a program of a GPU kernel sees of its arrays, and how the kernels are called.

A grid is (N, B*HV): chunk n of row r // HV, value head r % HV; or (V / BV, N, B*HV) where a program
makes BV of the V columns. Legend as in `rows`; C tokens of a chunk.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from effarch.kernels import varying
from effarch.kernels.delta_rule.pallas_gpu.rows import Plan

STATE_COLUMNS = 32
"""BV of the sequential passes: narrower is more programs, wider is fewer instructions."""


class Blocks:
    """Block specs of a plan; `columns` is BV where the grid begins with blocks of columns."""

    def __init__(self, plan: Plan, columns: int | None = None):
        self.plan, self.columns = plan, columns

    def _spec(self, shape, index) -> pl.BlockSpec:
        """`index(j, n, b, h)`: column block, chunk, batch row and value head."""
        heads = self.plan.value_heads
        if self.columns is None:
            return pl.BlockSpec(shape, lambda n, r: index(0, n, r // heads, r % heads))
        return pl.BlockSpec(shape, lambda j, n, r: index(j, n, r // heads, r % heads))

    def keys(self, width: int) -> pl.BlockSpec:
        """[C, width] of an array [B,T,H,width]."""
        group = self.plan.group
        shape = (None, self.plan.chunk, None, width)
        return self._spec(shape, lambda j, n, b, h: (b, n, h // group, 0))

    def key_columns(self) -> pl.BlockSpec:
        """[C, BV] of an array [B,T,H,K]."""
        group = self.plan.group
        shape = (None, self.plan.chunk, None, self.columns)
        return self._spec(shape, lambda j, n, b, h: (b, n, h // group, j))

    def values(self, width: int) -> pl.BlockSpec:
        """[C, width] of an array [B,T,HV,width]."""
        shape = (None, self.plan.chunk, None, width)
        return self._spec(shape, lambda j, n, b, h: (b, n, h, 0))

    def value_columns(self) -> pl.BlockSpec:
        """[C, BV] of an array [B,T,HV,V]."""
        shape = (None, self.plan.chunk, None, self.columns)
        return self._spec(shape, lambda j, n, b, h: (b, n, h, j))

    def per_token(self) -> pl.BlockSpec:
        """[C] of an array [B,HV,T]."""
        return self._spec((None, None, self.plan.chunk), lambda j, n, b, h: (b, h, n))

    def factor(self) -> pl.BlockSpec:
        """[C] or, per channel, [C, K] of a decay factor."""
        return self.values(self.plan.key) if self.plan.per_channel else self.per_token()

    def documents(self) -> pl.BlockSpec:
        """[C] of an array [B,T]."""
        return self._spec((None, self.plan.chunk), lambda j, n, b, h: (b, n))

    def tile(self, rows: int, lanes: int) -> pl.BlockSpec:
        """[rows, lanes] of an array [B,HV,N,rows,lanes]."""
        return self._spec((None, None, None, rows, lanes), lambda j, n, b, h: (b, h, n, 0, 0))

    def tile_columns(self, rows: int) -> pl.BlockSpec:
        """[rows, BV] of an array [B,HV,N,rows,V]."""
        shape = (None, None, None, rows, self.columns)
        return self._spec(shape, lambda j, n, b, h: (b, h, n, 0, j))


class Whole:
    """Block specs of a pass over all chunks in sequence: a grid (V / BV, B*HV), all tokens of a head."""

    def __init__(self, plan: Plan, length: int):
        self.plan, self.length = plan, length
        self.columns = min(STATE_COLUMNS, plan.value)

    def grid(self, batch: int) -> tuple[int, int]:
        return self.plan.value // self.columns, batch * self.plan.value_heads

    def _spec(self, shape, index) -> pl.BlockSpec:
        """`index(j, b, h)`: column block, batch row and value head."""
        heads = self.plan.value_heads
        return pl.BlockSpec(shape, lambda j, r: index(j, r // heads, r % heads))

    def keys(self) -> pl.BlockSpec:
        """[T, K] of an array [B,T,H,K]; per channel every value head has its own."""
        group = 1 if self.plan.per_channel else self.plan.group
        shape = (None, self.length, None, self.plan.key)
        return self._spec(shape, lambda j, b, h: (b, 0, h // group, 0))

    def values(self, width: int) -> pl.BlockSpec:
        """[T, width] of an array [B,T,HV,width]."""
        return self._spec((None, self.length, None, width), lambda j, b, h: (b, 0, h, 0))

    def value_columns(self) -> pl.BlockSpec:
        """[T, BV] of an array [B,T,HV,V]."""
        return self._spec((None, self.length, None, self.columns), lambda j, b, h: (b, 0, h, j))

    def per_token(self) -> pl.BlockSpec:
        """[T] of an array [B,HV,T]."""
        return self._spec((None, None, self.length), lambda j, b, h: (b, h, 0))

    def carry(self, width: int) -> pl.BlockSpec:
        """[N, width] of an array [B,HV,N,width]."""
        shape = (None, None, self.length // self.plan.chunk, width)
        return self._spec(shape, lambda j, b, h: (b, h, 0, 0))

    def state_columns(self) -> pl.BlockSpec:
        """[K, BV] of an array [B,HV,K,V]."""
        shape = (None, None, self.plan.key, self.columns)
        return self._spec(shape, lambda j, b, h: (b, h, 0, j))

    def all_states_columns(self) -> pl.BlockSpec:
        """[N, K, BV] of an array [B,HV,N,K,V]."""
        shape = (None, None, self.length // self.plan.chunk, self.plan.key, self.columns)
        return self._spec(shape, lambda j, b, h: (b, h, 0, 0, j))


def call(
    kernel: Callable,
    plan: Plan,
    grid: tuple[int, ...],
    inputs: dict[str, tuple[jax.Array | None, pl.BlockSpec]],
    outputs: dict[str, tuple[tuple[int, ...], jnp.dtype, pl.BlockSpec]],
    *,
    name: str,
    warps: int = 4,
    stages: int = 1,
) -> dict[str, jax.Array]:
    """Runs `kernel(plan, **refs)`; inputs and outputs by name, an input that is None is not passed."""
    inputs = {key: pair for key, pair in inputs.items() if pair[0] is not None}
    keys, like = [*inputs, *outputs], next(iter(inputs.values()))[0]

    def body(*refs):
        kernel(plan, **dict(zip(keys, refs)))

    body.__name__ = name
    results = pl.pallas_call(
        body,
        grid=grid,
        in_specs=[spec for _, spec in inputs.values()],
        out_specs=[spec for *_, spec in outputs.values()],
        out_shape=[varying.shape_like(*shape, like) for *shape, _ in outputs.values()],
        compiler_params=plgpu.CompilerParams(num_warps=warps, num_stages=stages),
        interpret=plan.interpret,
        name=name,
    )(*(array for array, _ in inputs.values()))
    return dict(zip(outputs, results))


def columns(ref, width: int) -> list[slice]:
    """All columns of a ref, so many at once."""
    width = min(width, ref.shape[1])
    return [slice(start, start + width) for start in range(0, ref.shape[1], width)]


def barrier(plan: Plan) -> None:
    """What any thread of the program has written to memory can now be read by all."""
    if not plan.interpret:  # the interpreter is one thread
        plgpu.debug_barrier()


def positions(chunk: int, dtype=jnp.int32) -> tuple[jax.Array, jax.Array]:
    """Row and column numbers, [C,C]."""
    return tuple(jax.lax.broadcasted_iota(dtype, (chunk, chunk), axis) for axis in (0, 1))


dot = functools.partial(jnp.dot, preferred_element_type=jnp.float32)


def pairs(plan: Plan, coarse, fine, docs, *, strict: bool) -> jax.Array:
    """[C,C] float32: the decay from token j to token i >= j (i > j), 0 elsewhere; refs of `Factors`."""
    row, tile = pairs_by_row(plan, coarse, fine, docs, strict=strict)
    return row[:, None] * tile


def pairs_by_row(plan: Plan, coarse, fine, docs, *, strict: bool) -> tuple[jax.Array, jax.Array]:
    """`pairs` as a number for each row [C], close to 1, times [C,C]."""
    row, column = positions(plan.chunk)
    sees = row > column if strict else row >= column
    if docs is not None:
        numbers = docs[...]
        sees &= numbers[:, None] == numbers[None, :]
    if coarse is None:
        return jnp.ones(plan.chunk, jnp.float32), jnp.where(sees, 1.0, 0.0)
    coarse, fine = coarse[...], fine[...]
    gap = (coarse[:, None] - coarse[None, :]) - fine[None, :]
    return jnp.exp2(fine), jnp.exp2(jnp.where(sees, gap, -jnp.inf))
