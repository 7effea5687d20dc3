"""The Hadamard transform on TPUs: products with ones, one pass over memory; see `tiles`."""

import jax.numpy as jnp
from jax.experimental import pallas as pl

from effarch.kernels import dispatch, varying
from effarch.kernels.hadamard import tiles, views

_LANES = 128
_WIDEST = 512
"""Elements of a side of a tile."""


def hadamard(x, block_size, axis, signs, cut=None, *, interpret=False):
    """See `api.hadamard`. `interpret` runs the kernel without a TPU: for tests."""
    if cut is not None:
        return views.on_pieces(hadamard, x, block_size, axis, signs, cut, interpret)
    dispatch.require("tpu", interpret)
    view = views.of_axis(x, axis, block_size)
    if view.shape[1] % _LANES or view.shape[2] % _LANES:
        _, p, q = view.shape
        raise dispatch.Unsupported(f"{p} x {q} elements are not multiples of {_LANES}")
    signs = jnp.ones(block_size) if signs is None else signs.astype(jnp.float32)
    x_LPQ, signs = varying.align([x.reshape(view.shape), signs])
    return _transform(x_LPQ, signs, view, interpret).reshape(x.shape)


@tiles.with_gradient
def _transform(x, signs, view, interpret):
    size = view.rotate

    axis = 1 if view.is_last else 0

    def kernel(ones_ref, x_ref, y_ref):
        for start in range(0, x_ref.shape[axis], _LANES):
            part = slice(start, start + _LANES)
            own = (slice(None), part) if view.is_last else (part, slice(None))
            y = tiles.transform(ones_ref[...], x_ref[own], axis, size)
            y_ref[own] = y.astype(y_ref.dtype)

    batch, p, q = view.shape
    side_p, side_q = (tile_side(n) for n in (p, q))
    spec = pl.BlockSpec((None, side_p, side_q), lambda n, i, j: (n, i, j))
    return pl.pallas_call(
        kernel,
        out_shape=varying.shape_like(view.shape, x.dtype, x),
        grid=(batch, p // side_p, q // side_q),
        in_specs=[pl.BlockSpec((_LANES, _LANES), lambda *_: (0, 0)), spec],
        out_specs=spec,
        interpret=interpret,
        name="hadamard",
    )(tiles.matrix(size, _LANES, signs), x)


def tile_side(size: int) -> int:
    """The largest multiple of the lanes up to `_WIDEST` that divides."""
    return max(n for n in range(_LANES, _WIDEST + 1, _LANES) if size % n == 0)
