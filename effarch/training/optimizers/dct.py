"""Low-rank subspaces without an SVD: the largest columns of a cosine transform.

"SVD-Free Low-Rank Adaptive Gradient Optimization for LLMs", arXiv 2505.17967. The rows of the DCT-II
matrix C are an orthonormal basis for every width n,

    C[i, j] = sqrt(2/n) cos(pi i (2j + 1) / (2n)),   row 0 divided by sqrt 2
    S = G C^T,   idx = the `rank` columns of S with the largest norms,   g = S[:, idx],   G ~ g C[idx]

for G [R, n] with its shorter side last, and only idx must be kept. For norms in l2 the rest is at most
(1 - rank / n) of |G|^2; the paper's default is l1.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from effarch.models import parameters


def matrix(n: int) -> Float[Array, "n n"]:
    """C, float32. The angle is taken modulo a whole turn, so that it is exact for n up to 32,768."""
    row = jnp.arange(n, dtype=jnp.int32)[:, None]
    column = jnp.arange(n, dtype=jnp.int32)[None, :]
    angle = (row * (2 * column + 1)) % (4 * n)
    basis = jnp.cos(angle.astype(jnp.float32) * (jnp.pi / (2 * n))) * (2 / n) ** 0.5
    return jnp.where(row == 0, basis / 2**0.5, basis)


def select(x: Float[Array, "... R n"], rank: int, norm: int) -> tuple[Array, Int[Array, "... r"]]:
    """(x C^T, the numbers of its `rank` largest columns in ascending order)."""
    turned = x @ matrix(x.shape[-1]).T
    sizes = jnp.sum(jnp.abs(turned) if norm == 1 else turned * turned, axis=-2)
    return turned, jnp.sort(jax.lax.top_k(sizes, rank)[1], axis=-1)


def columns(turned: Float[Array, "... R n"], index: Int[Array, "... r"]) -> Float[Array, "... R r"]:
    """turned[..., idx]."""
    return jnp.take_along_axis(turned, index[..., None, :], axis=-1)


def back(low: Float[Array, "... R r"], index: Int[Array, "... r"], n: int) -> Array:
    """low C[idx]: [..., R, n]."""
    return low @ matrix(n)[index]


class Sides:
    """The dimensions of every matrix parameter, looked up by path: partitions mask the others."""

    def __init__(self, groups: Any):
        self._dims = {group.path: group.matrix_dims for group in jax.tree.leaves(groups)}

    def of(self, key_path, shape: tuple[int, ...]) -> tuple[int, int]:
        """(longer, shorter) dimension of the parameter at a path."""
        first, second = self._dims[parameters.path_of(key_path)]
        return (first, second) if shape[first] >= shape[second] else (second, first)

    def turn(self, key_path, x: Array, *, shape: tuple[int, ...]) -> Array:
        """x with the shorter side last, [..., R, n]; `shape` is the parameter's."""
        return jnp.moveaxis(x, self.of(key_path, shape), (-2, -1))

    def turn_back(self, key_path, x: Array, *, shape: tuple[int, ...]) -> Array:
        """The inverse of `turn`."""
        return jnp.moveaxis(x, (-2, -1), self.of(key_path, shape))
