"""Quantization on TPUs: transform, scales and rounding of a tile in one pass over memory.

A tile is worked on with its blocks along the sublanes, where sharing a scale costs no shuffle of lanes;
one that lies the other way is turned by the product that transforms it, or by a transpose. Stochastic
rounding hashes each element's place in the array, so no noise is read and all backends draw alike.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from effarch.kernels import dispatch, varying
from effarch.kernels.hadamard import tiles
from effarch.kernels.hadamard.views import View
from effarch.kernels.quantize import places, rounding, xla

_LANES = 128
_LONGEST, _MOST = 1024, 4096
"""Elements of a tile along the blocks: at most so many if they divide, else all if not too many."""


def quantize(x, fmt, axes, shrink, ties, seed, rotation, cut=None, piece=None, *, interpret=False):
    """See `xla.quantize`. `interpret` runs the kernel without a TPU: for tests."""
    if cut is not None:
        return places.on_pieces(
            quantize, x, fmt, axes, shrink, ties, seed, rotation, cut, interpret
        )
    dispatch.require("tpu", interpret)
    view = places.view(x, fmt, axes, rotation, piece)
    signs = None if rotation is None else rotation.signs
    options = dict(view=view, signs=signs, interpret=interpret)
    largest = x
    if fmt.scale == "e4m3" and rotation is not None:  # its scales depend on the largest of all
        (largest,) = over_tiles(_largest(view), x, [("scales", jnp.float32)], **options)
    tensor = places.tensor_scale(fmt, shrink, largest, piece)
    body = _rounding(view, fmt, shrink, ties, seed is not None)
    wanted = [("values", jnp.bfloat16), ("scales", jnp.float32)]
    values, block = over_tiles(body, x, wanted, (places.words(seed, piece), tensor), **options)
    block = block[0].T if view.is_last else block
    shape = [n // view.block if dim == axes[0][0] else n for dim, n in enumerate(x.shape)]
    return values.reshape(x.shape).astype(jnp.float32), block.reshape(shape), tensor[0]


def length_of(view: View) -> int:
    """Elements of a tile along the blocks. Raises `Unsupported` for sizes that do not fill vectors."""
    _, p, q = view.shape
    long, lines = (q, p) if view.is_last else (p, q)
    if long % _LANES or lines % _LANES:
        raise dispatch.Unsupported(f"{p} x {q} elements are not multiples of {_LANES}")
    pieces = range(_LANES, _LONGEST + 1, _LANES)
    fitting = [n for n in pieces if long % n == 0 and n // view.block % 8 == 0]
    if not fitting and long > _MOST:
        raise dispatch.Unsupported(f"{long} elements along the blocks do not divide into tiles")
    return max(fitting, default=long)


def over_tiles(body: Callable, x, outputs, prefetched=None, *, view, signs=None, interpret=False):
    """[values like [L,P,Q] or scales [L,blocks,others], ...] as `outputs` of (which, dtype) say.

    `body(t, starts, words, tensor)` gets a tile [along the blocks, 128], transformed if the view says
    so, and returns a piece of every output; values [along, 128] as well.
    """
    batch, p, q = view.shape
    length = length_of(view)
    tile_p, tile_q = (_LANES, length) if view.is_last else (length, _LANES)
    if prefetched is None:
        prefetched = jnp.zeros(4, jnp.int32), jnp.zeros(1, jnp.float32)
    ones = tiles.matrix(view.rotate or 1, _LANES, signs if view.rotate else None)
    arrays = varying.align([*prefetched, ones, x.reshape(view.shape)])

    def kernel(words, tensor, ones_ref, x_ref, *output_refs):
        starts = pl.program_id(0), pl.program_id(1) * tile_p, pl.program_id(2) * tile_q
        found = body(_turned(view, ones_ref, x_ref[...]), starts, words, tensor)
        for (which, _), ref, part in zip(outputs, output_refs, found, strict=True):
            ref[...] = part.T if which == "values" and view.is_last else part

    by_tile = pl.BlockSpec((None, tile_p, tile_q), lambda n, i, j, *_: (n, i, j))
    by_blocks = pl.BlockSpec(
        (None, length // view.block, _LANES),
        lambda n, i, j, *_: (n, j, i) if view.is_last else (n, i, j),
    )
    blocks = (batch, q // view.block, p) if view.is_last else (batch, p // view.block, q)
    shapes = {"values": view.shape, "scales": blocks}
    return pl.pallas_call(
        kernel,
        out_shape=[
            varying.shape_like(shapes[which], dtype, arrays[-1]) for which, dtype in outputs
        ],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(batch, p // tile_p, q // tile_q),
            in_specs=[pl.BlockSpec((_LANES, _LANES), lambda *_: (0, 0)), by_tile],
            out_specs=[{"values": by_tile, "scales": by_blocks}[which] for which, _ in outputs],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",) * 3, vmem_limit_bytes=48 * 2**20
        ),
        interpret=interpret,
        name="quantize" if len(outputs) > 1 else "quantize_largest",
    )(*arrays)


def _turned(view, ones_ref, x):
    """Lines of a tile with the blocks along the first dimension, transformed, float32."""
    axis = 1 if view.is_last else 0
    if not view.rotate:
        return x.astype(jnp.float32).T if view.is_last else x.astype(jnp.float32)
    ones = ones_ref[...]
    pieces = [
        jax.lax.slice_in_dim(x, start, start + _LANES, axis=axis)
        for start in range(0, x.shape[axis], _LANES)
    ]
    turned = functools.partial(tiles.transform, ones, turned=view.is_last)
    return jnp.concatenate([turned(part, axis, view.rotate) for part in pieces], axis=0)


def _rounding(view, fmt, shrink, ties, is_random):
    def body(t, starts, words, tensor):
        noise = None
        if is_random:
            place = words[2] + places.places(view, starts, t.shape, turned=view.is_last)
            noise = _in_blocks(rounding.noise(place, (words[0], words[1])), view)
        values, block, _ = xla.round_blocks(
            _in_blocks(t, view), 1, fmt, shrink, ties, noise, tensor[0]
        )
        return values.reshape(t.shape).astype(jnp.bfloat16), block[:, 0]

    return body


def _largest(view):
    return lambda t, *_: [jnp.max(jnp.abs(_in_blocks(t, view)), axis=1)]


def _in_blocks(t, view):
    return t.reshape(-1, view.block, t.shape[1])
