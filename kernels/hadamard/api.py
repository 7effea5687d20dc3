"""The orthonormal Hadamard transform of blocks along one dimension, with optional random signs.

    y = (x * signs) H,   H[i, j] = (-1)^popcount(i & j) / sqrt(block_size)      (Sylvester)

H is symmetric and its own inverse. Signs come before the transform: flipped after it they leave
every magnitude as it was, and nothing is re-randomised (arXiv 2505.14669's code does so).
"""

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from effarch.kernels import dispatch

BACKENDS = ("reference", "xla", "pallas_tpu", "pallas_gpu")


def hadamard(
    x: jax.Array,
    *,
    block_size: int,
    axis: int = -1,
    signs: jax.Array | None = None,
    cut: NamedSharding | None = None,
    backend: str | None = None,
) -> jax.Array:
    """Transforms every block of `block_size` elements along `axis`; same shape and dtype as x.

    `signs` [block_size], +1 or -1, multiply x first; `signs * hadamard(y)` undoes the transform.
    block_size is a power of two that divides the dimension. Computed in float32. `cut`: how a mesh cuts
    x [rows, columns], so that kernels can run on each device's piece.
    """
    x = jnp.asarray(x)
    check(x, axis, block_size, signs)
    axis %= x.ndim
    return dispatch.call("hadamard", "hadamard", BACKENDS, backend, x, block_size, axis, signs, cut)


def check(x: jax.Array, axis: int, block_size: int, signs: jax.Array | None) -> None:
    """Raises ValueError for arguments that do not fit."""
    if not -x.ndim <= axis < x.ndim:
        raise ValueError(f"hadamard: axis={axis} is not a dimension of x {x.shape}.")
    if block_size < 1 or block_size & (block_size - 1):
        raise ValueError(
            f"hadamard: block_size={block_size} must be a power of two, such as 32 or 128."
        )
    if x.shape[axis] % block_size:
        raise ValueError(
            f"hadamard: block_size={block_size} does not divide dimension {axis} of x {x.shape}; use "
            "a smaller power of two, or change that size."
        )
    if signs is not None and signs.shape != (block_size,):
        raise ValueError(
            f"hadamard: signs have shape {signs.shape}; give one for each of the {block_size} "
            "elements of a block."
        )
