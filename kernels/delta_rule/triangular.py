"""The inverse of a unit lower triangular matrix, accurate where power series are not.

    (I + L)^-1   by forward substitution inside 16 x 16 diagonal blocks, then pairs of blocks are
    merged, 16 -> 32 -> 64 ...:   X21 = -X22 (L21 X11)

The inverse stays small for keys of norm 1 although powers of L grow like binomial coefficients
(similar keys, beta near 2), so Neumann products and Newton-Schulz iterations lose every digit there.
Legend: C matrix size = 16 * 2^m, W width of a block.
"""

import jax
import jax.numpy as jnp

BLOCK = 16


def inverse_unit_lower(lower: jax.Array) -> jax.Array:
    """(I + L)^-1 for strictly lower triangular L [..., C, C]; not meant to be differentiated."""
    size = lower.shape[-1]
    width = BLOCK
    inverse = _substitute(_diagonal_blocks(lower, width, 0))
    while width < size:
        below = _diagonal_blocks(lower, width, 1)
        upper_left, lower_right = inverse[..., 0::2, :, :], inverse[..., 1::2, :, :]
        corner = -_matmul(lower_right, _matmul(below, upper_left))
        inverse = jnp.concatenate(
            [
                jnp.concatenate([upper_left, jnp.zeros_like(corner)], axis=-1),
                jnp.concatenate([corner, lower_right], axis=-1),
            ],
            axis=-2,
        )
        width *= 2
    return inverse[..., 0, :, :]


def _diagonal_blocks(matrix: jax.Array, width: int, below: int) -> jax.Array:
    """Blocks (p, p) for below=0; (2p+1, 2p), left of the odd diagonal blocks, for below=1."""
    starts = range(0, matrix.shape[-1], width * (1 + below))
    blocks = [
        matrix[..., s + below * width : s + (below + 1) * width, s : s + width] for s in starts
    ]
    return jnp.stack(blocks, axis=-3)


def _substitute(blocks: jax.Array) -> jax.Array:
    """Forward substitution: once row m of the inverse is known, L_im times it leaves every row i.

    All blocks at once with the batch in the last axis, so that each step is one long vector operation.
    """
    batch = blocks.shape[:-2]
    width = blocks.shape[-1]
    lower = jnp.moveaxis(blocks.reshape(-1, width, width), 0, -1)
    rows = jnp.zeros_like(lower) + jnp.eye(width, dtype=blocks.dtype)[..., None]
    rows = jax.lax.fori_loop(0, width - 1, lambda m, x: x - lower[:, m, None] * x[m], rows)
    return jnp.moveaxis(rows, -1, 0).reshape(*batch, width, width)


def _matmul(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
