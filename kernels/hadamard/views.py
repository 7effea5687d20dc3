"""How an array lies before kernels that transform and round it: as [L, P, Q], blocks along P or Q."""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp

from effarch.kernels import dispatch, pieces

BLOCK_SIZES = (16, 32, 64, 128)


class View(NamedTuple):
    """What is known while tracing."""

    shape: tuple[int, int, int]
    is_last: bool
    """Whether blocks lie along Q, the dimension that is contiguous."""
    block: int
    """Elements that share a scale."""
    rotate: int
    """Block of the transform before; 0: none."""
    columns: int = 0
    """Of the whole matrix where this is a piece of one; 0: those of `shape`."""

    @property
    def unit(self) -> int:
        """What must lie in one tile along the blocks."""
        return max(self.block, self.rotate)


def of_axis(x, axis: int, rotate: int) -> View:
    """The view of x for transforms of `rotate` elements along an axis."""
    if x.dtype not in (jnp.float32, jnp.bfloat16):
        raise dispatch.Unsupported(f"x is {x.dtype}, not float32 or bfloat16")
    if x.size == 0:
        raise dispatch.Unsupported("x is empty")
    if rotate and rotate not in BLOCK_SIZES:
        raise dispatch.Unsupported(
            f"transforms of {rotate} are not of {BLOCK_SIZES[0]} to {BLOCK_SIZES[-1]}"
        )
    if axis == x.ndim - 1:
        shape = (1, x.size // x.shape[-1], x.shape[-1])
    else:
        shape = (math.prod(x.shape[:axis]), x.shape[axis], math.prod(x.shape[axis + 1 :]))
    return View(shape, axis == x.ndim - 1, 1, rotate)


def on_pieces(backend: Callable, x, block_size: int, axis: int, signs, cut, interpret: bool):
    """A backend's `hadamard` on each device's own piece of x."""

    def on_piece(x, piece, signs):
        return backend(x, block_size, axis, signs, interpret=interpret)

    return pieces.run(
        on_piece, x, cut, axis, block_size, signs, outputs=cut.spec, checked=not interpret
    )
