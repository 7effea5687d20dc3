"""Products of decayed queries and keys inside a chunk, for decays that differ between channels.

    P_ij = sum_d q_id k_jd exp(G_id - G_jd)   for j <= i,  and the same with k_i for j < i

exp(G_i) exp(-G_j) would overflow. So the chunk is halved again and again, until single tokens are
left: tokens i of a right half and j of the left half beside it meet at the border m between them,

    exp(G_i - G_j) = exp(g_m + ... + g_i) exp(g_(j+1) + ... + g_(m-1)).

Both exponents are sums of log decays (not differences: no cancellation either) and at most 0, every
pair i > j meets at exactly one of the log2(C) levels, and a level is one masked matrix product. That
replaces the reference rows of secondary chunking (GLA, arXiv 2312.06635), for any decay. All levels
run through the same loop, so that equal keys have exactly equal products: with beta = 2 the solve
would turn differences of the last digit into errors of 1e-5.
Legend: leading axes "...", C tokens of a chunk (a power of two).
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

HIGHEST = jax.lax.Precision.HIGHEST
_einsum = functools.partial(jnp.einsum, precision=HIGHEST)


class Levels(NamedTuple):
    """For halves of 1, 2, 4 ... C/2 tokens, stacked: which decays reach the border, who meets there."""

    sums: np.ndarray  # [levels,C,C]   1 where g_s lies between token t and the border
    meets: np.ndarray  # [levels,C,C]  1 where i is in a right half and j in the left half beside it


def products(rows: Sequence[jax.Array], k: jax.Array, g: jax.Array) -> list[jax.Array]:
    """P of every kind of row (queries, keys), strictly lower, [..., C, C] each."""

    def level(products, constants):
        sums, meets = constants
        decay = jnp.exp(_einsum("ts,...sk->...tk", sums, g))
        return [
            product + meets * _einsum("...ik,...jk->...ij", row * decay, k * decay)
            for product, row in zip(products, rows)
        ], None

    size = g.shape[-2]
    zero = jnp.zeros_like(g[..., :1]) * jnp.zeros(size, g.dtype)
    return jax.lax.scan(level, [zero] * len(rows), _levels(size, g.dtype))[0]


def diagonal(q: jax.Array, k: jax.Array) -> jax.Array:
    """The part of P that has no decay, a diagonal matrix [..., C, C]."""
    return _einsum("...ck,...ck->...c", q, k)[..., None] * np.eye(q.shape[-2], dtype=q.dtype)


def products_gradient(
    d_products: Sequence[jax.Array], rows: Sequence[jax.Array], k: jax.Array, g: jax.Array
) -> tuple[list[jax.Array], jax.Array]:
    """The gradients of the rows and of k as the writer (column), [..., C, K] each.

    Only the strictly lower triangles of the given gradients count.
    """

    def level(gradients, constants):
        sums, meets = constants
        d_rows, d_writer = gradients
        decay = jnp.exp(_einsum("ts,...sk->...tk", sums, g))
        met = [meets * d_product for d_product in d_products]
        d_rows = [
            d_row + decay * _einsum("...ij,...jk->...ik", d, k * decay)
            for d_row, d in zip(d_rows, met)
        ]
        for d, row in zip(met, rows):
            d_writer += decay * _einsum("...ij,...ik->...jk", d, row * decay)
        return (d_rows, d_writer), None

    zero = jnp.zeros_like(g)
    return jax.lax.scan(level, ([zero] * len(rows), zero), _levels(g.shape[-2], g.dtype))[0]


def _levels(size: int, dtype) -> Levels:
    time = np.arange(size)
    sums, meets = [], []
    for half in (2**level for level in range(size.bit_length() - 1)):
        same = time[:, None] // (2 * half) == time // (2 * half)
        is_right = time // half % 2 == 1
        right = same & is_right & is_right[:, None] & (time <= time[:, None])
        left = same & ~is_right & ~is_right[:, None] & (time > time[:, None])
        sums.append(right | left)
        meets.append(same & is_right[:, None] & ~is_right)
    return Levels(np.stack(sums).astype(dtype), np.stack(meets).astype(dtype))
