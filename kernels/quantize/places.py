"""What the kernels of quantization take, and where in the whole array the elements of a tile lie.

A tile becomes its values, which bfloat16 holds exactly for every format, and its block scales.
"""

import jax
import jax.numpy as jnp

from effarch.kernels import dispatch
from effarch.kernels.hadamard import views
from effarch.kernels.hadamard.views import View
from effarch.kernels.quantize import formats, scales


def view(x, fmt: formats.Format, axes, rotation) -> View:
    """The view of x. Raises `Unsupported` for what the kernels do not take."""
    if len(axes) != 1 or axes[0][1] not in views.BLOCK_SIZES:
        sizes = " x ".join(str(size) for _, size in axes)
        known = ", ".join(str(size) for size in views.BLOCK_SIZES)
        raise dispatch.Unsupported(f"blocks of {sizes} are not lines of {known} elements")
    ((axis, block),) = axes
    found = views.of_axis(x, axis, rotation.block_size if rotation else 0)
    if rotation is not None and rotation.axis != axis:
        raise dispatch.Unsupported("the transform and the blocks lie along different dimensions")
    return found._replace(block=block)


def places(view: View, starts: tuple, shape: tuple[int, int], *, turned: bool = False) -> jax.Array:
    """The place in the whole array of each element of a tile that begins at (l, p, q); int32, wrapped.

    `turned`: the tile lies transposed.
    """
    batch, first_p, first_q = starts
    _, size_p, size_q = view.shape
    p = first_p + jax.lax.broadcasted_iota(jnp.int32, shape, 1 if turned else 0)
    q = first_q + jax.lax.broadcasted_iota(jnp.int32, shape, 0 if turned else 1)
    return (batch * size_p + p) * size_q + q


def tensor_scale(fmt: formats.Format, shrink: float, largest: jax.Array | None) -> jax.Array:
    """float32 [1]; `largest` holds what the largest magnitude of all is among, for E4M3 scales."""
    if fmt.scale == "e4m3":
        found = scales.of_tensor(jnp.max(jnp.abs(largest)).astype(jnp.float32), fmt)
    else:
        _, found = scales.of_blocks(jnp.ones(()), fmt, shrink)
    return jnp.reshape(found, 1)


def words(seed: jax.Array | None) -> jax.Array:
    """Two words as int32, the same bits; zeros for None."""
    if seed is None:
        return jnp.zeros(2, jnp.int32)
    return jax.lax.bitcast_convert_type(seed, jnp.int32)
