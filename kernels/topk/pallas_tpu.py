"""The statistical threshold on TPUs: mean, deviation and cut of whole rows in one pass over memory.

The gradient is that of `xla`; it reads x and dy once.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from effarch.kernels import dispatch, varying
from effarch.kernels.topk import rows

_LANES = 128
_ELEMENTS = 2**18
"""Of a grid step, at most."""


def statistical_top_k(x, k, *, axis, where, stop_statistics, interpret=False):
    """See `api.statistical_top_k`. `interpret` runs the kernel without a TPU: for tests."""
    dispatch.require("tpu", interpret)
    plan = _plan(x, k, axis, where, interpret)
    y = _soft(x.reshape(-1, x.shape[-1]), plan, stop_statistics)
    return y.reshape(x.shape)


def statistical_threshold(x, k, *, axis, where, interpret=False):
    """See `api.statistical_threshold`."""
    dispatch.require("tpu", interpret)
    plan = _plan(x, k, axis, where, interpret)
    _, mean, spread = _forward(x.reshape(-1, x.shape[-1]), plan)
    return (mean + plan.quantile * spread).reshape(*x.shape[:-1], 1)


def _plan(x, k, axis, where, interpret) -> rows.Plan:
    plan = rows.plan(x, k, axis, where, interpret)
    if plan.length % _LANES:
        raise dispatch.Unsupported(f"rows of {plan.length} are not a multiple of {_LANES}")
    packed = 8 * 4 // x.dtype.itemsize  # rows of a tile
    count = x.size // plan.length
    if count % packed and count > packed:
        raise dispatch.Unsupported(f"{count} rows are not a multiple of {packed}")
    most = max(_ELEMENTS // plan.length, packed)
    fitting = [n for n in range(packed, most + 1, packed) if count % n == 0]
    return plan._replace(rows=max(fitting, default=count))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _soft(x, plan, stop_statistics):
    return _forward(x, plan)[0]


def _saving(x, plan, stop_statistics):
    y, mean, spread = _forward(x, plan)
    return y, (x, mean, spread)


def _backward(plan, stop_statistics, saved, dy):
    x, mean, spread = varying.align([*saved])

    def kernel(x_ref, dy_ref, mean_ref, spread_ref, dx_ref):
        wide = x_ref[...].astype(jnp.float32), dy_ref[...].astype(jnp.float32)
        dx = rows.gradient(*wide, mean_ref[...], spread_ref[...], plan, stop_statistics)
        dx_ref[...] = dx.astype(dx_ref.dtype)

    wide, narrow = _specs(plan)
    dx = _call(
        kernel,
        plan,
        [wide, wide, narrow, narrow],
        [wide],
        [(x.shape, x.dtype)],
        varying.align([x, dy, mean, spread]),
        "statistical_top_k_backward",
    )
    return (dx[0],)


_soft.defvjp(_saving, _backward)


def _forward(x, plan):
    """(y, mean, deviation), the last two [rows, 1]."""

    def kernel(x_ref, y_ref, mean_ref, spread_ref):
        x = x_ref[...].astype(jnp.float32)
        mean, spread = rows.moments(x, plan.length)
        y_ref[...] = jnp.maximum(x - (mean + plan.quantile * spread), 0.0).astype(y_ref.dtype)
        mean_ref[...], spread_ref[...] = mean, spread

    wide, narrow = _specs(plan)
    number = ((x.shape[0], 1), jnp.float32)
    return _call(
        kernel,
        plan,
        [wide],
        [wide, narrow, narrow],
        [(x.shape, x.dtype), number, number],
        [x],
        "statistical_top_k",
    )


def _specs(plan):
    wide = pl.BlockSpec((plan.rows, plan.length), lambda i: (i, 0))
    return wide, pl.BlockSpec((plan.rows, 1), lambda i: (i, 0))


def _call(kernel, plan, in_specs, out_specs, shapes, arrays, name):
    return pl.pallas_call(
        kernel,
        out_shape=[varying.shape_like(shape, dtype, arrays[0]) for shape, dtype in shapes],
        grid=(arrays[0].shape[0] // plan.rows,),
        in_specs=in_specs,
        out_specs=out_specs,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",), vmem_limit_bytes=48 * 2**20
        ),
        interpret=plan.interpret,
        name=name,
    )(*arrays)
