"""The short convolution on GPUs, in Triton: one pass over x forward, two passes backward.

    z_t = bias + sum_s [age_t >= s] kernel_(W-1-s) x_(t-s)        y_t = act(z_t)
    dx_t = sum_s kernel_(W-1-s) [age_(t+s) >= s] dz_(t+s)

where age_t counts the inputs before t that t may see (-1: padding). A program reads its block once for
each tap, a row further back, from the cache but for the first time; nothing passes between programs.
Backward, z is recomputed, dz is written in x's dtype, and a second pass adds its shifted rows up.
Legend: W taps, E rows of inputs (T, with those before the row T + W-1), C tokens and L channels of a
block.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from effarch.kernels import dispatch, varying
from effarch.kernels.short_conv import ages as ages_of
from effarch.kernels.short_conv import xla

_TOKENS = 32
_CHANNELS = (128, 64, 32, 16)
_WARPS = 4


class Plan(NamedTuple):
    """What is known while tracing."""

    taps: int  # W
    length: int  # T
    offset: int  # rows of the inputs before the first token
    activation: str | None
    interpret: bool


def short_conv(
    x, kernel, *, bias=None, activation=None, initial=None, segment_ids=None, interpret=False
):
    """See `api.short_conv`. `interpret` runs the kernels without a GPU, step by step: for tests."""
    dispatch.require("gpu", interpret)
    if x.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32) or x.shape[2] % _CHANNELS[-1]:
        raise dispatch.Unsupported(
            f"x is {x.dtype} with {x.shape[2]} channels; it takes floats of at most 32 bits and "
            f"multiples of {_CHANNELS[-1]} channels"
        )
    before, channels = kernel.shape[0] - 1, x.shape[2]
    bias = jnp.zeros(channels, kernel.dtype) if bias is None else bias
    x, kernel, bias, initial, segment_ids = varying.align([x, kernel, bias, initial, segment_ids])
    inputs, docs, is_real, tail = xla.prepared(x, before, initial, segment_ids)
    offset = 0 if initial is None else before
    plan = Plan(kernel.shape[0], x.shape[1], offset, activation, interpret)
    taps = jnp.concatenate([kernel, bias[None]]).astype(jnp.float32)
    ages = None
    if segment_ids is not None:
        ages = ages_of.count(docs[:, before:], is_real, before, initial is not None)
    return _convolve(x if initial is None else inputs, taps, ages, plan), tail


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _convolve(x, taps, ages, plan):
    """y [B,T,D] from inputs [B,E,D], taps [W+1,D] (the kernel, the bias) and ages [B,T] or None."""

    def kernel(x_ref, taps_ref, ages_ref, y_ref):
        time = _rows()
        age = None if ages_ref is None else _read(ages_ref, time, -1)
        z = _before_activation(plan, x_ref, taps_ref, time, age)
        y = z * jax.nn.sigmoid(z) if plan.activation == "silu" else z
        _write(y_ref, time, y if age is None else jnp.where(age >= 0, y, 0.0))

    y = ((x.shape[0], plan.length, x.shape[2]), x.dtype)
    return _call(kernel, plan, [x, taps, ages], [y], plan.length, "short_conv_forward")[0]


def _forward(x, taps, ages, plan):
    return _convolve(x, taps, ages, plan), (x, taps, ages)


def _backward(plan, saved, d_y):
    x, taps, ages = saved

    def before_activation(x_ref, taps_ref, ages_ref, d_y_ref, d_z_ref, d_taps_ref):
        time = _rows()
        age = None if ages_ref is None else _read(ages_ref, time, -1)
        d_z = _read(d_y_ref, time, is_wanted=True if age is None else age >= 0)
        if plan.activation == "silu":
            z = _before_activation(plan, x_ref, taps_ref, time, age)
            gate = jax.nn.sigmoid(z)
            d_z = d_z * gate * (1 + z * (1 - gate))
        for shift in range(plan.taps):
            part = d_z * _seen(plan, x_ref, time, age, shift)
            d_taps_ref[plan.taps - 1 - shift] = jnp.sum(part, axis=0)
        d_taps_ref[plan.taps] = jnp.sum(d_z, axis=0)
        _write(d_z_ref, time, d_z)

    def pull_back(d_z_ref, taps_ref, ages_ref, d_x_ref):
        row, d_x = _rows(), 0.0
        for shift in range(plan.taps):
            time = row - plan.offset + shift
            is_reached = True if ages_ref is None else _read(ages_ref, time, -1) >= shift
            reaching = _read(d_z_ref, time, is_wanted=is_reached)
            d_x += reaching * taps_ref[plan.taps - 1 - shift]
        _write(d_x_ref, row, d_x)

    blocks = pl.cdiv(plan.length, _TOKENS)
    outputs = [(d_y.shape, d_y.dtype), ((x.shape[0], blocks, *taps.shape), jnp.float32)]
    inputs = [x, taps, ages, d_y]
    d_z, d_taps = _call(
        before_activation, plan, inputs, outputs, plan.length, "short_conv_backward"
    )
    inputs, d_x = [d_z, taps, ages], (x.shape, x.dtype)
    (d_x,) = _call(pull_back, plan, inputs, [d_x], x.shape[1], "short_conv_transposed")
    d_ages = None if ages is None else np.zeros(ages.shape, jax.dtypes.float0)
    return d_x, jnp.sum(d_taps, axis=(0, 1)), d_ages


_convolve.defvjp(_forward, _backward)


def _call(kernel, plan, arrays, outputs, rows, name):
    """Runs `kernel(*references of arrays or None, *references of outputs)` on blocks of `rows` rows.

    Arrays are wide [B,rows,D], the taps [W+1,D] or ages int32 [B,T]; outputs wide or sums
    [B,blocks,W+1,D].
    """
    batch, _, channels = outputs[0][0]
    lanes = next(size for size in _CHANNELS if channels % size == 0)

    def spec(shape, dtype):
        if len(shape) == 4:
            return pl.BlockSpec((None, None, shape[2], lanes), lambda b, j, n: (b, n, 0, j))
        if len(shape) == 3:
            return pl.BlockSpec((None, shape[1], lanes), lambda b, j, n: (b, 0, j))
        if dtype == jnp.int32:
            return pl.BlockSpec((None, shape[1]), lambda b, j, n: (b, 0))
        return pl.BlockSpec((shape[0], lanes), lambda b, j, n: (0, j))

    given = [x is not None for x in arrays]
    arrays = varying.align([x for x in arrays if x is not None])

    def on_references(*refs):
        refs = iter(refs)
        kernel(*(next(refs) if is_given else None for is_given in given), *refs)

    return pl.pallas_call(
        on_references,
        out_shape=[varying.shape_like(shape, dtype, arrays[0]) for shape, dtype in outputs],
        grid=(batch, channels // lanes, pl.cdiv(rows, _TOKENS)),
        in_specs=[spec(x.shape, x.dtype) for x in arrays],
        out_specs=[spec(*output) for output in outputs],
        compiler_params=plgpu.CompilerParams(num_warps=_WARPS, num_stages=1),
        interpret=plan.interpret,
        name=name,
    )(*arrays)


def _rows():
    """[C,1]: the rows of a program."""
    return pl.program_id(2) * _TOKENS + jax.lax.broadcasted_iota(jnp.int32, (_TOKENS, 1), 0)


def _read(ref, row, other=0.0, is_wanted=True):
    """Rows of a wide array [C,L] in float32, or of ages [C,1]; `other` where there are none."""
    is_there = (row >= 0) & (row < ref.shape[0]) & is_wanted
    place, is_there = _places(ref, jnp.clip(row, 0, ref.shape[0] - 1), is_there)
    found = plgpu.load(ref.at[place], mask=is_there, other=other)
    return found if len(place) == 1 else found.astype(jnp.float32)


def _write(ref, row, values):
    place, is_there = _places(ref, row, row < ref.shape[0])
    plgpu.store(ref.at[place], values.astype(ref.dtype), mask=is_there)


def _places(ref, row, is_there):
    if len(ref.shape) == 1:
        return (row,), is_there
    shape = (row.shape[0], ref.shape[1])
    lane = jax.lax.broadcasted_iota(jnp.int32, shape, 1)
    return (jnp.broadcast_to(row, shape), lane), jnp.broadcast_to(is_there, shape)


def _seen(plan, x_ref, time, age, shift):
    """The inputs `shift` rows back, 0 where a token may not see them."""
    return _read(x_ref, time + plan.offset - shift, is_wanted=True if age is None else age >= shift)


def _before_activation(plan, x_ref, taps_ref, time, age):
    z = taps_ref[plan.taps]
    for shift in range(plan.taps):
        z += _seen(plan, x_ref, time, age, shift) * taps_ref[plan.taps - 1 - shift]
    return z
