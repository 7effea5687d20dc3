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


def decays(g: jax.Array) -> tuple[jax.Array, jax.Array]:
    """exp of the sums of g [..., C, K] from the chunk's start through t, and behind t to its end."""
    size = g.shape[-2]
    ones = np.ones((size, size), g.dtype)
    from_start, to_end = (
        _einsum("ts,...sk->...tk", x, g) for x in (np.tril(ones), np.triu(ones, 1))
    )
    return jnp.exp(from_start), jnp.exp(to_end)


def products(q: jax.Array, k: jax.Array, g: jax.Array) -> tuple[jax.Array, jax.Array]:
    """P [..., C, C] and its counterpart for keys with keys, strictly lower, [..., C, C]."""

    def level(products, constants):
        sums, meets = constants
        qk, kk = products
        decay = jnp.exp(_einsum("ts,...sk->...tk", sums, g))
        q_near, k_near = q * decay, k * decay
        qk += meets * _einsum("...ik,...jk->...ij", q_near, k_near)
        kk += meets * _einsum("...ik,...jk->...ij", k_near, k_near)
        return (qk, kk), None

    size = g.shape[-2]
    zero = jnp.zeros_like(g[..., :1]) * jnp.zeros(size, g.dtype)
    (qk, kk), _ = jax.lax.scan(level, (zero, zero), _levels(size, g.dtype))
    return qk + _einsum("...ck,...ck->...c", q, k)[..., None] * np.eye(size, dtype=g.dtype), kk


def products_gradient(
    d_qk: jax.Array, d_kk: jax.Array, q: jax.Array, k: jax.Array, g: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """d q, d k as reader (row) and d k as writer (column), without the diagonal; [..., C, K] each.

    Only the strictly lower triangles of the given gradients count.
    """

    def level(gradients, constants):
        sums, meets = constants
        d_q, d_reader, d_writer = gradients
        decay = jnp.exp(_einsum("ts,...sk->...tk", sums, g))
        q_near, k_near = q * decay, k * decay
        d_rows_q, d_rows_k = meets * d_qk, meets * d_kk
        d_q += decay * _einsum("...ij,...jk->...ik", d_rows_q, k_near)
        d_reader += decay * _einsum("...ij,...jk->...ik", d_rows_k, k_near)
        d_columns = _einsum("...ij,...ik->...jk", d_rows_q, q_near)
        d_writer += decay * (d_columns + _einsum("...ij,...ik->...jk", d_rows_k, k_near))
        return (d_q, d_reader, d_writer), None

    zero = jnp.zeros_like(g)
    return jax.lax.scan(level, (zero, zero, zero), _levels(g.shape[-2], g.dtype))[0]


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
