"""Quantization on GPUs, in Triton: transform, scales and rounding of a tile in one pass over memory.

Stochastic rounding hashes each element's place in the array, so no noise is read and all backends draw
alike.
"""

import functools

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from effarch.kernels import dispatch, varying
from effarch.kernels.hadamard import pallas_gpu as hadamard
from effarch.kernels.hadamard import tiles
from effarch.kernels.quantize import places, rounding, xla


def quantize(x, fmt, axes, shrink, ties, seed, rotation, cut=None, piece=None, *, interpret=False):
    """See `xla.quantize`. `interpret` runs the kernel without a GPU: for tests."""
    if cut is not None:
        return places.on_pieces(
            quantize, x, fmt, axes, shrink, ties, seed, rotation, cut, interpret
        )
    dispatch.require("gpu", interpret)
    view = places.view(x, fmt, axes, rotation, piece)
    signs = None if rotation is None else rotation.signs
    run = functools.partial(_over_tiles, x, view, signs, interpret)
    largest = x
    if fmt.scale == "e4m3" and rotation is not None:  # its scales depend on the largest of all
        (largest,) = run(_largest(view), ["scales"])
    tensor = places.tensor_scale(fmt, shrink, largest, piece)
    body = _rounding(view, fmt, shrink, ties, seed is not None)
    values, block = run(body, ["values", "scales"], (places.words(seed, piece), tensor))
    shape = [n // view.block if dim == axes[0][0] else n for dim, n in enumerate(x.shape)]
    return values.reshape(x.shape).astype(jnp.float32), block.reshape(shape), tensor[0]


def _over_tiles(x, view, signs, interpret, body, outputs, arguments=None):
    """bfloat16 values [L,P,Q] and float32 scales, as `outputs` names them."""
    batch, p, q = view.shape
    high, wide = hadamard.tile_of(view)
    unit = view.unit
    if arguments is None:
        arguments = jnp.zeros(4, jnp.int32), jnp.zeros(1, jnp.float32)
    ones = tiles.matrix(view.rotate or unit, unit, signs if view.rotate else None)
    arrays = varying.align([*arguments, ones, x.reshape(view.shape)])

    def kernel(words_ref, tensor_ref, ones_ref, x_ref, *output_refs):
        starts = pl.program_id(0), pl.program_id(1) * high, pl.program_id(2) * wide
        x = x_ref[...]
        if view.rotate:
            x = hadamard.transformed(view, ones_ref[...], x)
        found = body(x.astype(jnp.float32), starts, words_ref, tensor_ref)
        for ref, part in zip(output_refs, found, strict=True):
            ref[...] = part

    by = (1, view.block) if view.is_last else (view.block, 1)
    shapes = {"values": view.shape, "scales": (batch, p // by[0], q // by[1])}
    blocks = {"values": (None, high, wide), "scales": (None, high // by[0], wide // by[1])}
    dtypes = {"values": jnp.bfloat16, "scales": jnp.float32}
    return pl.pallas_call(
        kernel,
        out_shape=[
            varying.shape_like(shapes[which], dtypes[which], arrays[-1]) for which in outputs
        ],
        grid=(batch, p // high, q // wide),
        in_specs=[
            pl.BlockSpec((4,), lambda *_: (0,)),
            pl.BlockSpec((1,), lambda *_: (0,)),
            pl.BlockSpec((unit, unit), lambda *_: (0, 0)),
            pl.BlockSpec((None, high, wide), lambda n, i, j: (n, i, j)),
        ],
        out_specs=[pl.BlockSpec(blocks[which], lambda n, i, j: (n, i, j)) for which in outputs],
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name="quantize" if len(outputs) > 1 else "quantize_largest",
    )(*arrays)


def _rounding(view, fmt, shrink, ties, is_random):
    def body(x, starts, words_ref, tensor_ref):
        noise = None
        if is_random:
            place = words_ref[2] + places.places(view, starts, x.shape)
            noise = _in_blocks(rounding.noise(place, (words_ref[0], words_ref[1])), view)
        blocks, within = _in_blocks(x, view), 2 if view.is_last else 1
        values, block, _ = xla.round_blocks(
            blocks, within, fmt, shrink, ties, noise, tensor_ref[0], rounding.round_even
        )
        values = values.reshape(x.shape).astype(jnp.bfloat16)
        return values, block.reshape(block.shape[0], -1)

    return body


def _largest(view):
    def body(x, *_):
        return [jnp.max(jnp.abs(_in_blocks(x, view)), axis=2 if view.is_last else 1)]

    return body


def _in_blocks(x, view):
    high, wide = x.shape
    if view.is_last:
        return x.reshape(high, wide // view.block, view.block)
    return x.reshape(high // view.block, view.block, wide)
