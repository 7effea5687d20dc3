"""The sparse feed-forward on TPUs: rows of active neurons are fetched one by one, a block ahead of use.

A row must be contiguous to be fetched alone, so the tables must be kept as [F, width / 128, 128]. The
compiler would lay out others anew for every token, which costs more than reading all of them.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from effarch.kernels import dispatch, platform, varying
from effarch.kernels.sparse_ffn import active_rows
from effarch.kernels.sparse_ffn.active_rows import ROWS

_LANES = 128


def sparse_ffn(gate, x, up, down, *, interpret=False):
    """See `api.sparse_ffn`. `interpret` runs the kernel without a TPU: for tests."""
    if not interpret and platform.current() != "tpu":
        raise dispatch.Unsupported(f"it runs on TPUs, and this program is for {platform.current()}")
    active_rows.check(x, up, down, _LANES)
    if any(table.ndim != 3 or table.shape[2] != _LANES for table in (up, down)):
        raise dispatch.Unsupported(
            f"tables are {up.shape} and {down.shape}, and rows can be fetched only from tables kept as "
            f"[F, width / {_LANES}, {_LANES}]"
        )

    def gathered(*args):
        return _gathered(*args, interpret)

    return active_rows.run(gathered, gate, x, up, down)


def _gathered(index_N, count, gate_BN, x, up, down, interpret):
    B, width, tables = x.shape[0], down.shape[1] * _LANES, (up, down)
    gate_NBJ = gate_BN.reshape(B, -1, ROWS).swapaxes(0, 1)
    arrays = varying.align([index_N, count[None], gate_NBJ, x, *tables])
    whole = pl.BlockSpec(memory_space=pltpu.VMEM)
    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    return pl.pallas_call(
        _kernel,
        out_shape=varying.shape_like((B, width), jnp.float32, arrays[-1]),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(1,),
            in_specs=[whole, whole, anywhere, anywhere],
            out_specs=whole,
            scratch_shapes=[
                *(pltpu.VMEM((2, ROWS, *table.shape[1:]), table.dtype) for table in tables),
                pltpu.SemaphoreType.DMA((2,)),
            ],
        ),
        interpret=interpret,
        name="sparse_ffn",
    )(*arrays)


def _kernel(index, count, gate_ref, x_ref, up, down, y_ref, up_rows, down_rows, arrived):
    turns = (count[0] + ROWS - 1) // ROWS

    def copies(turn, row):
        slot, neuron = turn % 2, index[turn * ROWS + row]
        return [
            pltpu.make_async_copy(table.at[neuron], rows.at[slot, row], arrived.at[slot])
            for table, rows in ((up, up_rows), (down, down_rows))
        ]

    def start(turn):
        def one(row, _):
            for copy in copies(turn, row):
                copy.start()
            return 0

        jax.lax.fori_loop(0, ROWS, one, 0)

    def wait(turn):
        def one(row, _):
            for copy in copies(turn, row):
                copy.wait()
            return 0

        jax.lax.fori_loop(0, ROWS, one, 0)

    def block(turn, _):
        @pl.when(turn + 1 < turns)
        def _():
            start(turn + 1)

        wait(turn)
        slot, narrow = turn % 2, x_ref.dtype
        u_BJ = sum(
            active_rows.dot(
                x_ref[:, c * _LANES : (c + 1) * _LANES],
                up_rows[slot, :, c, :].astype(narrow),
                transposed=True,
            )
            for c in range(up_rows.shape[2])
        )
        h_BJ = (gate_ref[turn] * u_BJ).astype(narrow)
        for c in range(down_rows.shape[2]):
            part = down_rows[slot, :, c, :].astype(narrow)
            y_ref[:, c * _LANES : (c + 1) * _LANES] += active_rows.dot(h_BJ, part)
        return 0

    y_ref[...] = jnp.zeros_like(y_ref)

    @pl.when(turns > 0)
    def _():
        start(0)

    jax.lax.fori_loop(0, turns, block, 0)
