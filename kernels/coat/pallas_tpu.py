"""COAT's update on TPUs: both moments decoded, moved and encoded again in one pass over memory.

A grid step has one group of 128 of many rows, which fills the lanes; what the groups of a row share
stands in lanes of their numbers and is passed on from step to step.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from effarch.kernels import dispatch, varying
from effarch.kernels.coat import flat, groups
from effarch.kernels.quantize import e4m3_bits, rounding
from effarch.kernels.quantize.formats import ELEMENTS

_GROUP = 128
_LEAST, _MOST = 32, 512
"""Rows of a grid step: a multiple of the first up to the second."""


def coat_adam(g, m, v, start, rates, group_size, expand, *, interpret=False):
    """See `xla.coat_adam`. `interpret` runs the kernel without a TPU: for tests."""
    dispatch.require("tpu", interpret)
    length = g.shape[-1] if g.ndim else 1
    if group_size != _GROUP or length % _GROUP:
        raise dispatch.Unsupported(
            f"rows of {length} are not groups of {_GROUP} (asked: {group_size})"
        )
    rows, count = g.size // length, length // _GROUP
    high = _rows(rows)
    inputs = flat.operands(g, m, v, count)
    arrays = varying.align([start, *inputs])
    wide = pl.BlockSpec((high, _GROUP), lambda i, j, *_: (i, j))
    narrow = pl.BlockSpec((high, count), lambda i, j, *_: (i, 0))
    found = pl.pallas_call(
        _kernel(rates, expand),
        out_shape=flat.outputs(arrays[1:]),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(rows // high, count),
            in_specs=[wide] * 3 + [narrow] * 4,
            out_specs=[wide] * 3 + [narrow] * 4,
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=48 * 2**20
        ),
        # What is updated takes its old place, and d the gradient's.
        input_output_aliases={index + 1: index for index in range(7)},
        interpret=interpret,
        name="coat_adam",
    )(*arrays)
    return flat.results(found, g.shape)


def _kernel(rates, expand):
    def kernel(start, g_ref, m_ref, v_ref, *refs):
        d_ref, new_m_ref, new_v_ref, *new_shared = refs[4:]
        old = [ref[...] for ref in refs[:4]]
        is_own = jax.lax.broadcasted_iota(jnp.int32, old[0].shape, 1) == pl.program_id(1)
        own = [jnp.sum(jnp.where(is_own, x, 0.0), axis=1, keepdims=True) for x in old]
        m = groups.restore(e4m3_bits.decode(m_ref[...]), *own[:2])
        v = groups.restore(e4m3_bits.decode(v_ref[...]), *own[2:])
        d, *moments = groups.step(g_ref[...], m, v, (start[0], start[1]), rates)
        d_ref[...] = d
        found = []
        for x, ref in zip(moments, (new_m_ref, new_v_ref)):
            hi, k = groups.measure(x, expand)
            rounded = rounding.nearest(groups.compress(x, hi, k), ELEMENTS["e4m3"])
            ref[...] = e4m3_bits.encode(rounded)
            found += [hi, k]
        for x, ref in zip(found, new_shared):
            ref[...] = jnp.where(is_own, x, ref[...])

    return kernel


def _rows(rows: int) -> int:
    """Rows of a grid step. Raises `Unsupported` where they do not come in multiples of 32."""
    if rows <= _LEAST:
        return rows
    if rows % _LEAST:
        raise dispatch.Unsupported(f"{rows} rows are not a multiple of {_LEAST}")
    return max(n for n in range(_LEAST, _MOST + 1, _LEAST) if rows % n == 0)
