"""The statistical threshold on GPUs, in Triton: mean, deviation and cut of a row in one pass.

A program has one row; what its power of two is longer than the row is masked. The gradient is that of
`xla`; it reads x and dy once.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from effarch.kernels import dispatch, varying
from effarch.kernels.topk import rows


def statistical_top_k(x, k, *, axis, where, stop_statistics, interpret=False):
    """See `api.statistical_top_k`. `interpret` runs the kernel without a GPU: for tests."""
    dispatch.require("gpu", interpret)
    plan = rows.plan(x, k, axis, where, interpret)
    return _soft(x.reshape(-1, plan.length), plan, stop_statistics).reshape(x.shape)


def statistical_threshold(x, k, *, axis, where, interpret=False):
    """See `api.statistical_threshold`."""
    dispatch.require("gpu", interpret)
    plan = rows.plan(x, k, axis, where, interpret)
    _, mean, spread = _forward(x.reshape(-1, plan.length), plan)
    return (mean + plan.quantile * spread).reshape(*x.shape[:-1], 1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _soft(x, plan, stop_statistics):
    return _forward(x, plan)[0]


def _saving(x, plan, stop_statistics):
    y, mean, spread = _forward(x, plan)
    return y, (x, mean, spread)


def _backward(plan, stop_statistics, saved, dy):
    arrays = varying.align([saved[0], dy, *saved[1:]])

    def kernel(x_ref, dy_ref, mean_ref, spread_ref, dx_ref):
        place, is_real = _row(plan)
        x, dy = (_read(ref, place, is_real) for ref in (x_ref, dy_ref))
        dx = rows.gradient(x, dy, mean_ref[0], spread_ref[0], plan, stop_statistics)
        _write(dx_ref, place, is_real, dx)

    return (_call(kernel, plan, [(arrays[0].shape, arrays[0].dtype)], arrays, "_backward")[0],)


_soft.defvjp(_saving, _backward)


def _forward(x, plan):
    """(y, mean, deviation), the last two [rows]."""

    def kernel(x_ref, y_ref, mean_ref, spread_ref):
        place, is_real = _row(plan)
        x = _read(x_ref, place, is_real)
        mean, spread = rows.moments(x, plan.length, is_real)
        _write(y_ref, place, is_real, jnp.maximum(x - (mean + plan.quantile * spread), 0.0))
        mean_ref[...], spread_ref[...] = mean.reshape(1), spread.reshape(1)

    number = ((x.shape[0],), jnp.float32)
    return _call(kernel, plan, [(x.shape, x.dtype), number, number], [x], "")


def _row(plan):
    """Where the entries of a program's row lie, [1, a power of two], and which are there."""
    place = jax.lax.broadcasted_iota(jnp.int32, (1, pl.next_power_of_2(plan.length)), 1)
    return place, place < plan.length


def _read(ref, place, is_real):
    row = jnp.full_like(place, 0) + pl.program_id(0)
    return plgpu.load(ref.at[row, place], mask=is_real, other=0.0).astype(jnp.float32)


def _write(ref, place, is_real, values):
    row = jnp.full_like(place, 0) + pl.program_id(0)
    plgpu.store(ref.at[row, place], values.astype(ref.dtype), mask=is_real)


def _call(kernel, plan, shapes, arrays, name):
    """Wide arrays are whole; numbers [rows] come one a program."""
    number = pl.BlockSpec((1,), lambda i: (i,))

    def spec(shape):
        return number if len(shape) == 1 else pl.BlockSpec(shape, lambda i: (0, 0))

    warps = min(max(pl.next_power_of_2(plan.length) // 1024, 1), 16)
    return pl.pallas_call(
        kernel,
        out_shape=[varying.shape_like(shape, dtype, arrays[0]) for shape, dtype in shapes],
        grid=(arrays[0].shape[0],),
        in_specs=[spec(x.shape) for x in arrays],
        out_specs=[spec(shape) for shape, _ in shapes],
        compiler_params=plgpu.CompilerParams(num_warps=warps, num_stages=1),
        interpret=plan.interpret,
        name=f"statistical_top_k{name}",
    )(*arrays)
