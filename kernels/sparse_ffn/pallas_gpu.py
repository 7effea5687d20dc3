"""The sparse feed-forward on GPUs, in Triton: two kernels that read the rows of active neurons alone.

    h_N = gate_N (x . up_N)          a program for each block of neurons in use
    y   = sum over N of h_N down_N   a program for a piece of the width and every eighth block

The eight sums of a piece are added afterwards, in order: the same bits every time.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from effarch.kernels import dispatch, platform, varying
from effarch.kernels.sparse_ffn import active_rows, api

_ROWS = 32
_DEEP, _WIDE = 64, 64
_PARTS = 8


def sparse_ffn(gate, x, up, down, *, interpret=False):
    """See `api.sparse_ffn`. `interpret` runs the kernels without a GPU: for tests."""
    if not interpret and platform.current() != "gpu":
        raise dispatch.Unsupported(f"it runs on GPUs, and this program is for {platform.current()}")
    up, down = api.unfolded(up), api.unfolded(down)
    active_rows.check(x, up, down, _DEEP)

    def gathered(*args):
        return _gathered(*args, interpret)

    return active_rows.run(gathered, gate, x, up, down)


def _gathered(index_N, count, gate_BN, x, up, down, interpret):
    (B, N), D = gate_BN.shape, down.shape[1]
    arrays = varying.align([index_N, count[None], gate_BN, x, up, down])
    index_N, count, gate_BN, x, up, down = arrays

    def call(kernel, grid, out_spec, shape, dtype, name, *operands):
        return pl.pallas_call(
            kernel,
            out_shape=varying.shape_like(shape, dtype, x),
            grid=grid,
            in_specs=[_whole(operand) for operand in operands],
            out_specs=out_spec,
            compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=2),
            interpret=interpret,
            name=name,
        )(*operands)

    h_BN = call(
        _hidden,
        (N // _ROWS,),
        pl.BlockSpec((B, _ROWS), lambda n: (0, n)),
        (B, N),
        x.dtype,
        "sparse_ffn_hidden",
        *(index_N, count, gate_BN, x, up),
    )
    parts = call(
        _output,
        (D // _WIDE, _PARTS),
        pl.BlockSpec((None, B, _WIDE), lambda d, part: (part, 0, d)),
        (_PARTS, B, D),
        jnp.float32,
        "sparse_ffn_output",
        *(index_N, count, h_BN, down),
    )
    return jnp.sum(parts, axis=0)


def _hidden(index_ref, count_ref, gate_ref, x_ref, up_ref, h_ref):
    first = pl.program_id(0) * _ROWS

    @pl.when(first < count_ref[0])
    def _():
        own = pl.ds(first, _ROWS)
        index_J, narrow = index_ref[own], x_ref.dtype

        def step(k, u_BJ):
            rows_JP = _rows(up_ref, index_J, k * _DEEP, _DEEP).astype(narrow)
            return u_BJ + active_rows.dot(x_ref[:, pl.ds(k * _DEEP, _DEEP)], rows_JP.T)

        zeros = jnp.zeros(h_ref.shape, jnp.float32)
        steps = jnp.int32(up_ref.shape[1] // _DEEP)
        u_BJ = jax.lax.fori_loop(jnp.int32(0), steps, step, zeros)
        h_ref[...] = (gate_ref[:, own] * u_BJ).astype(narrow)


def _output(index_ref, count_ref, h_ref, down_ref, y_ref):
    first, part = pl.program_id(0) * _WIDE, pl.program_id(1)
    blocks = (count_ref[0] + _ROWS - 1) // _ROWS

    def step(turn, y_BD):
        own = pl.ds((turn * _PARTS + part) * _ROWS, _ROWS)
        rows_JD = _rows(down_ref, index_ref[own], first, _WIDE).astype(h_ref.dtype)
        return y_BD + active_rows.dot(h_ref[:, own], rows_JD)

    turns = (blocks - part + _PARTS - 1) // _PARTS
    zeros = jnp.zeros(y_ref.shape, jnp.float32)
    y_ref[...] = jax.lax.fori_loop(jnp.int32(0), turns, step, zeros)


def _rows(table_ref, index_J, first, width: int):
    """A piece of some rows of a table."""
    columns = first + jax.lax.broadcasted_iota(jnp.int32, (len(index_J), width), 1)
    rows = jax.lax.broadcast_in_dim(index_J, columns.shape, (0,))
    return plgpu.load(table_ref.at[rows, columns])


def _whole(array):
    return pl.BlockSpec(array.shape, lambda *_: (0,) * array.ndim)
