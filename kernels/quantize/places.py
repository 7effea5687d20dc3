"""What the kernels of quantization take, and where in the whole array the elements of a tile lie.

A tile becomes its values, which bfloat16 holds exactly for every format, and its block scales.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from effarch.kernels import dispatch, pieces, varying
from effarch.kernels.hadamard import views
from effarch.kernels.hadamard.views import View
from effarch.kernels.quantize import formats, scales


def view(x, fmt: formats.Format, axes, rotation, piece: pieces.Piece | None = None) -> View:
    """The view of x. Raises `Unsupported` for what the kernels do not take."""
    if len(axes) != 1 or axes[0][1] not in views.BLOCK_SIZES:
        sizes = " x ".join(str(size) for _, size in axes)
        known = ", ".join(str(size) for size in views.BLOCK_SIZES)
        raise dispatch.Unsupported(f"blocks of {sizes} are not lines of {known} elements")
    ((axis, block),) = axes
    found = views.of_axis(x, axis, rotation.block_size if rotation else 0)
    if rotation is not None and rotation.axis != axis:
        raise dispatch.Unsupported("the transform and the blocks lie along different dimensions")
    return found._replace(block=block, columns=0 if piece is None else piece.columns)


def on_pieces(backend: Callable, x, fmt, axes, shrink, ties, seed, rotation, cut, interpret: bool):
    """A backend's `quantize` on each device's own piece of x: the blocks and the noise of the whole."""
    found = view(x, fmt, axes, rotation)
    ((axis, _),) = axes

    def on_piece(x, piece, seed, signs):
        turned = None if rotation is None else rotation._replace(signs=signs)
        return backend(x, fmt, axes, shrink, ties, seed, turned, None, piece, interpret=interpret)

    signs = None if rotation is None else rotation.signs
    outputs = (cut.spec, cut.spec, PartitionSpec())
    return pieces.run(
        on_piece, x, cut, axis, found.unit, seed, signs, outputs=outputs, checked=not interpret
    )


def places(view: View, starts: tuple, shape: tuple[int, int], *, turned: bool = False) -> jax.Array:
    """The place in the whole array of each element of a tile that begins at (l, p, q); int32, wrapped.

    Counted from the first of a piece. `turned`: the tile lies transposed.
    """
    batch, first_p, first_q = starts
    _, size_p, size_q = view.shape
    p = first_p + jax.lax.broadcasted_iota(jnp.int32, shape, 1 if turned else 0)
    q = first_q + jax.lax.broadcasted_iota(jnp.int32, shape, 0 if turned else 1)
    return (batch * size_p + p) * (view.columns or size_q) + q


def tensor_scale(
    fmt: formats.Format, shrink: float, largest: jax.Array, piece: pieces.Piece | None
) -> jax.Array:
    """float32 [1]; `largest` holds what the largest magnitude of all is among, for E4M3 scales."""
    if fmt.scale == "e4m3":
        largest = jnp.max(jnp.abs(largest)).astype(jnp.float32)
        if piece is not None and piece.axes:
            largest = jax.lax.pmax(largest, piece.axes)
        found = scales.of_tensor(largest, fmt)
    else:
        _, found = scales.of_blocks(jnp.ones(()), fmt, shrink)
    return jnp.reshape(found, 1)


def words(seed: jax.Array | None, piece: pieces.Piece | None) -> jax.Array:
    """int32 [4]: the seed's two words, the same bits (zeros for None), a piece's first place, 0."""
    seed = jnp.zeros(2, jnp.uint32) if seed is None else seed
    start = jnp.zeros((), jnp.int32) if piece is None else piece.start
    own = jnp.stack([start, jnp.zeros_like(start)])
    return jnp.concatenate(varying.align([jax.lax.bitcast_convert_type(seed, jnp.int32), own]))
