"""The short convolution on TPUs: one pass over x forward, one over x and dy backward.

    z_t = bias + sum_s [age_t >= s] kernel_(W-1-s) x_(t-s)        y_t = act(z_t)
    dx_t = sum_s kernel_(W-1-s) [age_(t+s) >= s] dz_(t+s)

where age_t counts the inputs before t that t may see (-1: padding). A block of time reads the last rows
of the block before it through a window of its own; backward the blocks go from the last to the first
and hand on what their first rows owe to the rows before. z is recomputed.
Legend: W taps, C tokens of a block, L channels of a block, R rows treated at once.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from effarch.kernels import dispatch, varying
from effarch.kernels.chunked import rows
from effarch.kernels.short_conv import ages as ages_of
from effarch.kernels.short_conv import xla

MOST_TAPS = 7
LANES = 128
_TOKENS, _CHANNELS = (512, 256, 128), (512, 256, 128)
_HALO = 16  # rows of a window on the block before: a tile of bfloat16
_KEPT = 8  # of these, as a tile of float32
_ROWS = 64


class Plan(NamedTuple):
    """What is known while tracing."""

    taps: int  # W
    activation: str | None
    packed: bool
    interpret: bool


def short_conv(
    x, kernel, *, bias=None, activation=None, initial=None, segment_ids=None, interpret=False
):
    """See `api.short_conv`. `interpret` runs the kernels without a TPU, step by step: for tests."""
    _check(x, kernel, interpret)
    before, channels = kernel.shape[0] - 1, x.shape[2]
    bias = jnp.zeros(channels, kernel.dtype) if bias is None else bias
    x, kernel, bias, initial, segment_ids = varying.align([x, kernel, bias, initial, segment_ids])
    inputs, docs, is_real, tail = xla.prepared(x, before, initial, segment_ids)
    plan = Plan(kernel.shape[0], activation, segment_ids is not None, interpret)
    start = jnp.zeros_like(x, shape=(x.shape[0], _HALO, channels))
    if initial is not None:
        x = inputs[:, before:]
        start = jnp.concatenate([start[:, before:], inputs[:, :before]], axis=1)
    taps = jnp.concatenate([kernel, bias[None]]).astype(jnp.float32)
    taps = jnp.pad(taps, ((0, 8 - taps.shape[0]), (0, 0)))
    ages = None
    if plan.packed:
        ages = ages_of.count(docs[:, before:], is_real, before, initial is not None)
        ages = rows.filled(ages[..., None], LANES, "constant").swapaxes(1, 2)  # padded: 0, cut off
        ages = jnp.broadcast_to(ages, (ages.shape[0], 8, ages.shape[2])).astype(jnp.float32)
    y = _convolve(rows.filled(x, LANES, "constant"), start, taps, ages, plan)
    return y[:, : x.shape[1]], tail


def _check(x, kernel, interpret):
    dispatch.require("tpu", interpret)
    if x.dtype not in (jnp.bfloat16, jnp.float32):
        raise dispatch.Unsupported(f"x is {x.dtype}; it must be bfloat16 or float32")
    if kernel.shape[0] > MOST_TAPS or x.shape[2] % LANES:
        raise dispatch.Unsupported(
            f"{kernel.shape[0]} taps on {x.shape[2]} channels; it takes at most {MOST_TAPS} taps and "
            f"multiples of {LANES} channels"
        )


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _convolve(x, start, taps, ages, plan):
    """y [B,T,D]; start [B,16,D] the rows before x; taps [8,D]: the kernel, the bias; ages [B,8,T]."""
    call, specs = _call(x, start, taps, ages, plan, lambda n: n)
    block, halo, first, weights, age = specs
    inputs = [(block, x), (halo, x), (first, start), (weights, taps), (age, ages)]
    return call(_forward_kernel, inputs, [(block, x.shape, x.dtype)], "short_conv_forward")[0]


def _forward(x, start, taps, ages, plan):
    return _convolve(x, start, taps, ages, plan), (x, start, taps, ages)


def _backward(plan, saved, d_y):
    x, start, taps, ages = saved
    chunks = x.shape[1] // _size(x.shape[1], _TOKENS)
    call, specs = _call(x, start, taps, ages, plan, lambda n: chunks - 1 - n)
    block, halo, first, weights, age = specs
    inputs = [(block, x), (halo, x), (first, start), (weights, taps), (age, ages), (block, d_y)]
    lanes = weights.block_shape[1]
    per_row = pl.BlockSpec((None, 8, lanes), lambda b, j, n: (b, 0, j))
    outputs = [
        (block, x.shape, x.dtype),
        (first, start.shape, start.dtype),
        (per_row, (x.shape[0], *taps.shape), jnp.float32),
    ]
    scratch = [pltpu.VMEM((plan.taps, _KEPT, lanes), jnp.float32)]
    d_x, d_start, d_taps = call(_backward_kernel, inputs, outputs, "short_conv_backward", scratch)
    return d_x, d_start, jnp.sum(d_taps, axis=0), None if ages is None else jnp.zeros_like(ages)


_convolve.defvjp(_forward, _backward)


def _size(length, sizes):
    return next(size for size in sizes if length % size == 0)


def _call(x, start, taps, ages, plan, at):
    """A function that runs a kernel on blocks, and the specs of its arrays; step n is block at(n)."""
    batch, length, channels = x.shape
    tokens, lanes = _size(length, _TOKENS), _size(channels, _CHANNELS)
    grid = (batch, channels // lanes, length // tokens)
    halos = tokens // _HALO
    specs = (
        pl.BlockSpec((None, tokens, lanes), lambda b, j, n: (b, at(n), j)),
        pl.BlockSpec(
            (None, _HALO, lanes), lambda b, j, n: (b, jnp.maximum(at(n) * halos - 1, 0), j)
        ),
        pl.BlockSpec((None, _HALO, lanes), lambda b, j, n: (b, 0, j)),
        pl.BlockSpec((8, lanes), lambda b, j, n: (0, j)),
        pl.BlockSpec((None, 8, tokens), lambda b, j, n: (b, 0, at(n))),
    )

    def call(kernel, inputs, outputs, name, scratch=()):
        inputs = [pair for pair in inputs if pair[1] is not None]
        if plan.packed:
            scratch = [*scratch, pltpu.VMEM((tokens, LANES), jnp.float32)]
        shapes = [varying.shape_like(shape, dtype, x) for _, shape, dtype in outputs]
        return pl.pallas_call(
            functools.partial(kernel, plan),
            grid=grid,
            in_specs=[spec for spec, _ in inputs],
            out_specs=[spec for spec, *_ in outputs],
            out_shape=shapes,
            scratch_shapes=scratch,
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "parallel", "arbitrary")
            ),
            interpret=plan.interpret,
            name=name,
        )(*(array for _, array in inputs))

    return call, specs


def _forward_kernel(plan, x_ref, halo_ref, start_ref, taps_ref, *rest):
    ages_ref, y_ref, wide_ref = rest if plan.packed else (None, *rest, None)
    is_first = pl.program_id(2) == 0
    _widen(ages_ref, wide_ref)
    for own in _pieces(x_ref.shape[1]):
        taps = taps_ref[:, own]

        def piece(i, before, own=own, taps=taps):
            here = pl.ds(pl.multiple_of(i * _ROWS, _ROWS), _ROWS)
            x = x_ref[here, own].astype(jnp.float32)
            age = wide_ref[here, :] if plan.packed else None
            z, _ = _before_activation(plan, before, x, taps, age)
            y = z * jax.nn.sigmoid(z) if plan.activation == "silu" else z
            y = y if age is None else jnp.where(age >= 0, y, 0.0)
            y_ref[here, own] = y.astype(y_ref.dtype)
            return x[_ROWS - _KEPT :]

        before = _rows_before(is_first, start_ref, halo_ref, own)
        _loop(plan, x_ref.shape[0] // _ROWS, piece, before)


def _backward_kernel(plan, x_ref, halo_ref, start_ref, taps_ref, *rest):
    ages_ref, *rest, wide_ref = rest if plan.packed else (None, *rest, None)
    d_y_ref, d_x_ref, d_start_ref, d_taps_ref, owed_ref = rest
    step, num_steps = pl.program_id(2), pl.num_programs(2)
    _widen(ages_ref, wide_ref)
    pieces = x_ref.shape[0] // _ROWS

    @pl.when(step == 0)
    def _():
        owed_ref[...] = jnp.zeros_like(owed_ref)
        d_taps_ref[...] = jnp.zeros_like(d_taps_ref)

    for own in _pieces(x_ref.shape[1]):
        taps, first = (
            taps_ref[:, own],
            _rows_before(step == num_steps - 1, start_ref, halo_ref, own),
        )

        def piece(i, carry, own=own, taps=taps, first=first):
            owed, sums = carry
            begin = pl.multiple_of((pieces - 1 - i) * _ROWS, _ROWS)
            here = pl.ds(begin, _ROWS)
            age = wide_ref[here, :] if plan.packed else None
            above = pl.ds(pl.multiple_of(jnp.maximum(begin - _HALO, 0), _HALO), _HALO)
            before = x_ref[above, own].astype(jnp.float32)[_HALO - _KEPT :]
            before = jnp.where(begin == 0, first, before)
            x = x_ref[here, own].astype(jnp.float32)
            z, seen = _before_activation(plan, before, x, taps, age)
            d_z = d_y_ref[here, own].astype(jnp.float32)
            if plan.activation == "silu":
                gate = jax.nn.sigmoid(z)
                d_z = d_z * gate * (1 + z * (1 - gate))
            d_x, owing, parts = jnp.zeros_like(d_z), [], []
            for shift in range(plan.taps):
                reaches = d_z if age is None else jnp.where(age >= shift, d_z, 0.0)
                owing.append(reaches[:_KEPT])
                parts.append(reaches * seen[shift])
                tap = taps[plan.taps - 1 - shift : plan.taps - shift]
                d_x += tap * _up(reaches, owed[shift], shift)
            parts.append(d_z if age is None else jnp.where(age >= 0, d_z, 0.0))
            d_x_ref[here, own] = d_x.astype(d_x_ref.dtype)
            sums = [a + jnp.sum(p.reshape(-1, _KEPT, LANES), axis=0) for a, p in zip(sums, parts)]
            return owing, sums

        zeros = [jnp.zeros((_KEPT, LANES), jnp.float32)] * (plan.taps + 1)
        owed = [owed_ref[shift, :, own] for shift in range(plan.taps)]
        owed, sums = _loop(plan, pieces, piece, (owed, zeros))
        *sums, d_bias = [jnp.sum(x, axis=0, keepdims=True) for x in sums]
        d_start = jnp.zeros((_KEPT, LANES), jnp.float32)
        for shift in range(plan.taps):
            owed_ref[shift, :, own] = owed[shift]
            tap = taps[plan.taps - 1 - shift : plan.taps - shift]
            if shift:
                d_start += tap * _up(jnp.zeros_like(d_start), owed[shift], shift)
        d_taps = jnp.concatenate([*sums[::-1], d_bias, *[jnp.zeros_like(d_bias)] * (7 - plan.taps)])
        d_taps_ref[:, own] += d_taps
        d_start = jnp.concatenate([jnp.zeros_like(d_start), d_start])
        d_start_ref[:, own] = d_start.astype(d_start_ref.dtype)  # that of the first block stays


def _loop(plan, count, body, start):
    """Written out for the TPU, whose units then overlap the steps; a loop for the interpreter."""
    return jax.lax.fori_loop(0, count, body, start, unroll=not plan.interpret)


def _pieces(channels):
    return [slice(lane, lane + LANES) for lane in range(0, channels, LANES)]


def _widen(ages_ref, wide_ref):
    """Ages along the rows, the same in all lanes."""
    if ages_ref is not None:
        wide_ref[...] = jnp.broadcast_to(ages_ref[...].T[:, :1], wide_ref.shape)


def _rows_before(is_first, start_ref, halo_ref, own):
    """The last 8 rows before the block, float32."""
    start, halo = (ref[:, own].astype(jnp.float32)[-_KEPT:] for ref in (start_ref, halo_ref))
    return jnp.where(is_first, start, halo)


def _before_activation(plan, before, x, taps, age):
    """z, and x shifted down by 0 ... W-1 rows, of R rows; `before` are the 8 above."""
    extended = jnp.concatenate([before, x])
    seen = [x] + [pltpu.roll(extended, s, 0)[_KEPT:] for s in range(1, plan.taps)]
    z = taps[plan.taps : plan.taps + 1]
    for shift, moved in enumerate(seen):
        term = moved * taps[plan.taps - 1 - shift : plan.taps - shift]
        z = z + (term if age is None or not shift else jnp.where(age >= shift, term, 0.0))
    return z, seen


def _up(x, after, shift):
    """x moved up by `shift` rows, the first rows of `after` following."""
    if not shift:
        return x
    extended = jnp.concatenate([x, after])
    return pltpu.roll(extended, extended.shape[0] - shift, 0)[: x.shape[0]]
