"""The Hadamard transform on GPUs, in Triton: products with ones, one pass over memory; see `tiles`."""

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from effarch.kernels import dispatch, varying
from effarch.kernels.hadamard import tiles, views

_ELEMENTS = 8192
"""Of a tile, at most."""


def hadamard(x, block_size, axis, signs, cut=None, *, interpret=False):
    """See `api.hadamard`. `interpret` runs the kernel without a GPU: for tests."""
    if cut is not None:
        return views.on_pieces(hadamard, x, block_size, axis, signs, cut, interpret)
    dispatch.require("gpu", interpret)
    view = views.of_axis(x, axis, block_size)
    tile_of(view)
    signs = jnp.ones(block_size) if signs is None else signs.astype(jnp.float32)
    x_LPQ, signs = varying.align([x.reshape(view.shape), signs])
    return _transform(x_LPQ, signs, view, interpret).reshape(x.shape)


def tile_of(view: views.View) -> tuple[int, int]:
    """Elements of a tile along P and Q, powers of two. Raises `Unsupported` where they do not divide."""
    _, p, q = view.shape
    unit = view.unit
    if view.is_last:
        wide = _power(q, max(unit, 128))
        high = _power(p, max(_ELEMENTS // wide, 1))
        fits = wide % unit == 0
    else:
        high, wide = unit, _power(q, 128)
        fits = p % unit == 0
    if not fits or high * wide // unit < 16:
        raise dispatch.Unsupported(
            f"{p} x {q} elements do not divide into tiles of powers of two for blocks of {unit}"
        )
    return high, wide


def transformed(view: views.View, ones, x):
    """A tile of x [tile_of(view)] transformed along its blocks, float32; `ones` is [unit, unit]."""
    if not view.is_last:
        return tiles.transform(ones, x, 0, view.rotate)
    return tiles.transform(ones, x.reshape(-1, view.unit), 1, view.rotate).reshape(x.shape)


@tiles.with_gradient
def _transform(x, signs, view, interpret):
    def kernel(ones_ref, x_ref, y_ref):
        y_ref[...] = transformed(view, ones_ref[...], x_ref[...]).astype(y_ref.dtype)

    batch, p, q = view.shape
    high, wide = tile_of(view)
    spec = pl.BlockSpec((None, high, wide), lambda n, i, j: (n, i, j))
    unit = view.unit
    return pl.pallas_call(
        kernel,
        out_shape=varying.shape_like(view.shape, x.dtype, x),
        grid=(batch, p // high, q // wide),
        in_specs=[pl.BlockSpec((unit, unit), lambda *_: (0, 0)), spec],
        out_specs=spec,
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name="hadamard",
    )(tiles.matrix(view.rotate, unit, signs), x)


def _power(size: int, most: int) -> int:
    """The largest power of two that divides `size` and is at most `most`."""
    return min(size & -size, 1 << (most.bit_length() - 1))
