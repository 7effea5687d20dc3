"""The Hadamard transform as a product with its matrix: small, dense and fast on every device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np


def hadamard(x, block_size, axis, signs):
    """See `api.hadamard`."""
    matrix = jnp.asarray(_matrix(block_size))
    if signs is not None:
        matrix = signs.astype(jnp.float32)[:, None] * matrix
    before, after = x.shape[:axis], x.shape[axis + 1 :]
    exact = jax.lax.Precision.HIGHEST
    if not after:
        y = jnp.matmul(x.reshape(-1, block_size), matrix, precision=exact)
    else:
        rows = x.reshape(-1, block_size, int(np.prod(after)))
        y = jnp.einsum("nbk,bc->nck", rows, matrix, precision=exact)
    return y.reshape(*before, x.shape[axis], *after)


@functools.cache
def _matrix(size: int) -> np.ndarray:
    """Sylvester's matrix, orthonormal."""
    matrix = np.ones((1, 1))
    while len(matrix) < size:
        matrix = np.kron([[1, 1], [1, -1]], matrix)
    return (matrix / np.sqrt(size)).astype(np.float32)
