"""The Hadamard transform as a product with its matrix: small, dense and fast on every device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np


def hadamard(x, block_size, axis, signs, cut=None):
    """See `api.hadamard`."""
    dtype, x = x.dtype, x.astype(jnp.float32)
    matrix = jnp.asarray(sylvester(block_size) * np.float32(block_size**-0.5))
    if signs is not None:
        matrix = signs.astype(jnp.float32)[:, None] * matrix
    before, after = x.shape[:axis], x.shape[axis + 1 :]
    exact = jax.lax.Precision.HIGHEST
    if not after:
        y = jnp.matmul(x.reshape(-1, block_size), matrix, precision=exact)
    else:
        rows = x.reshape(-1, block_size, int(np.prod(after)))
        y = jnp.einsum("nbk,bc->nck", rows, matrix, precision=exact)
    return y.reshape(*before, x.shape[axis], *after).astype(dtype)


@functools.cache
def sylvester(size: int) -> np.ndarray:
    """The matrix of 1 and -1, float32."""
    matrix = np.ones((1, 1), np.float32)
    while len(matrix) < size:
        matrix = np.kron(np.float32([[1, 1], [1, -1]]), matrix)
    return matrix
