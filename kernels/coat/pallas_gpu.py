"""COAT's update on GPUs, in Triton: both moments decoded, moved and encoded again in one pass.

A program has the same group of 128 of some rows.
"""

from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from effarch.kernels import dispatch, varying
from effarch.kernels.coat import flat, groups
from effarch.kernels.quantize import e4m3_bits, rounding
from effarch.kernels.quantize.formats import ELEMENTS

_ROWS = 16
_SIZES = (32, 64, 128, 256, 512)


def coat_adam(g, m, v, start, rates, group_size, expand, *, interpret=False):
    """See `xla.coat_adam`. `interpret` runs the kernel without a GPU: for tests."""
    dispatch.require("gpu", interpret)
    length = g.shape[-1] if g.ndim else 1
    if group_size not in _SIZES or length % group_size:
        raise dispatch.Unsupported(
            f"rows of {length} are not whole groups of 32 to 512 ({group_size})"
        )
    rows, count = g.size // length, length // group_size
    high = min(rows & -rows, _ROWS)
    inputs = flat.operands(g, m, v, count)
    arrays = varying.align([start, *inputs])
    wide = pl.BlockSpec((high, group_size), lambda i, j: (i, j))
    narrow = pl.BlockSpec((high, 1), lambda i, j: (i, j))
    found = pl.pallas_call(
        _kernel(rates, expand),
        out_shape=flat.outputs(arrays[1:]),
        grid=(rows // high, count),
        in_specs=[pl.BlockSpec((2,), lambda *_: (0,)), *[wide] * 3, *[narrow] * 4],
        out_specs=[wide] * 3 + [narrow] * 4,
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=1),
        # What is updated takes its old place, and d the gradient's.
        input_output_aliases={index + 1: index for index in range(7)},
        interpret=interpret,
        name="coat_adam",
    )(*arrays)
    return flat.results(found, g.shape)


def _kernel(rates, expand):
    def kernel(start_ref, g_ref, m_ref, v_ref, *refs):
        old = [ref[...] for ref in refs[:4]]
        d_ref, m_out, v_out, *shared_refs = refs[4:]
        m = groups.restore(e4m3_bits.decode(m_ref[...]), *old[:2])
        v = groups.restore(e4m3_bits.decode(v_ref[...]), *old[2:])
        d, *moments = groups.step(g_ref[...], m, v, (start_ref[0], start_ref[1]), rates)
        d_ref[...] = d
        for x, ref, pair in zip(moments, (m_out, v_out), (shared_refs[:2], shared_refs[2:])):
            hi, k = groups.measure(x, expand)
            values = groups.compress(x, hi, k)
            rounded = rounding.nearest(values, ELEMENTS["e4m3"], even=rounding.round_even)
            ref[...] = e4m3_bits.encode(rounded)
            pair[0][...], pair[1][...] = hi, k

    return kernel
