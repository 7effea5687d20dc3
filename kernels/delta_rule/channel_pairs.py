"""Products of decayed queries and keys inside a chunk, for decays that differ between channels.

    P_ij = sum_d q_id k_jd exp(G_id - G_jd)   for j <= i,  and the same with k_i for j < i

exp(G_i) exp(-G_j) would overflow. So the chunk is halved again and again: tokens i of a right half
and j of the left half beside it meet at the border m between them,

    exp(G_i - G_j) = exp(g_m + ... + g_i) exp(g_(j+1) + ... + g_(m-1)),

both exponents are sums of log decays (never differences, so no cancellation either), at most 0, and
every pair of halves is one matrix product. This replaces secondary chunking with reference rows
(GLA, arXiv 2312.06635) and works for any decay.
Legend: leading axes "...", C tokens of a chunk (a power of two), W width of a half.
"""

import jax
import jax.numpy as jnp

HIGHEST = jax.lax.Precision.HIGHEST


def log_decays(g: jax.Array) -> list[tuple[jax.Array, jax.Array]]:
    """For blocks of W = 1, 2, 4 ... C tokens: log decay from the block's start through each token,
    and from behind each token to the block's end, both [..., C/W, W, K] (for W = C: [..., C, K])."""
    size = g.shape[-2]
    from_start, to_end = g[..., None, :], jnp.zeros_like(g)[..., None, :]
    levels = [(from_start, to_end)]
    while from_start.shape[-2] < size:
        left, right = _halves(from_start)
        left_end, right_end = _halves(to_end)
        from_start = jnp.concatenate([left, right + left[..., -1:, :]], axis=-2)
        to_end = jnp.concatenate([left_end + right[..., -1:, :], right_end], axis=-2)
        levels.append((from_start, to_end))
    levels[-1] = (from_start[..., 0, :, :], to_end[..., 0, :, :])
    return levels


def products(q: jax.Array, k: jax.Array, g: jax.Array) -> tuple[jax.Array, jax.Array]:
    """P [..., C, C] and its counterpart for keys with keys, strictly lower, [..., C, C]."""
    qk = jnp.einsum("...ck,...ck->...c", q, k, precision=HIGHEST)[..., None, None]
    qk = jnp.broadcast_to(qk, (*g.shape[:-1], 1, 1))
    kk = jnp.zeros_like(qk)
    for from_start, to_end in log_decays(g)[:-1]:
        q_rows, k_rows, columns = _factored(q, k, from_start, to_end)
        width = from_start.shape[-2]
        rows = jnp.concatenate([q_rows, k_rows], axis=-2)
        corners = jnp.einsum("...ik,...jk->...ij", rows, columns, precision=HIGHEST)
        qk = _grow(qk, corners[..., :width, :])
        kk = _grow(kk, corners[..., width:, :])
    return qk[..., 0, :, :], kk[..., 0, :, :]


def products_gradient(
    d_qk: jax.Array, d_kk: jax.Array, q: jax.Array, k: jax.Array, g: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """d q, d k as reader (row) and d k as writer (column), without the diagonal; [..., C, K] each.

    Only the strictly lower triangles of the given gradients count.
    """
    d_q = d_k_reader = d_k_writer = jnp.zeros_like(g)
    d_qk, d_kk = d_qk[..., None, :, :], d_kk[..., None, :, :]
    for from_start, to_end in reversed(log_decays(g)[:-1]):
        width = from_start.shape[-2]
        corners = jnp.concatenate([d_qk[..., width:, :width], d_kk[..., width:, :width]], axis=-2)
        d_qk, d_kk = _shrink(d_qk), _shrink(d_kk)
        q_rows, k_rows, columns = _factored(q, k, from_start, to_end)
        rows = jnp.concatenate([q_rows, k_rows], axis=-2)
        d_rows = jnp.einsum("...ij,...jk->...ik", corners, columns, precision=HIGHEST)
        d_columns = jnp.einsum("...ij,...ik->...jk", corners, rows, precision=HIGHEST)
        read = jnp.exp(_halves(from_start)[1])
        d_q += _place(None, read * d_rows[..., :width, :], g)
        d_k_reader += _place(None, read * d_rows[..., width:, :], g)
        d_k_writer += _place(jnp.exp(_halves(to_end)[0]) * d_columns, None, g)
    return d_q, d_k_reader, d_k_writer


def _factored(q, k, from_start, to_end):
    """Decayed q and k of the right halves, decayed k of the left halves, [..., C/2W, W, K]."""
    width = from_start.shape[-2]
    q, k = (x.reshape(*x.shape[:-2], -1, width, x.shape[-1]) for x in (q, k))
    k_left, k_right = _halves(k)
    read = jnp.exp(_halves(from_start)[1])
    return _halves(q)[1] * read, k_right * read, k_left * jnp.exp(_halves(to_end)[0])


def _halves(blocks: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Left and right of each pair of blocks [..., number, W, K]."""
    return blocks[..., 0::2, :, :], blocks[..., 1::2, :, :]


def _grow(blocks: jax.Array, corners: jax.Array) -> jax.Array:
    """Lower triangular blocks of width W, two by two, with the corner between them: width 2W."""
    left, right = _halves(blocks)
    upper = jnp.concatenate([left, jnp.zeros_like(left)], axis=-1)
    return jnp.concatenate([upper, jnp.concatenate([corners, right], axis=-1)], axis=-2)


def _shrink(blocks: jax.Array) -> jax.Array:
    """The two diagonal blocks of width W of each block of width 2W, in order."""
    width = blocks.shape[-1] // 2
    pair = jnp.stack([blocks[..., :width, :width], blocks[..., width:, width:]], axis=-3)
    return pair.reshape(*blocks.shape[:-3], -1, width, width)


def _place(left: jax.Array | None, right: jax.Array | None, like: jax.Array) -> jax.Array:
    """Puts halves [..., C/2W, W, K] back in time order, zeros for the missing half."""
    left = jnp.zeros_like(right) if left is None else left
    right = jnp.zeros_like(left) if right is None else right
    return jnp.stack([left, right], axis=-3).reshape(like.shape)
