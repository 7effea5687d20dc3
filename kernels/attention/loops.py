"""Blockwise attention, forward and backward, as loops: a program whose size does not grow with T.

For sequences of many blocks: an outer loop over query blocks (backward: key blocks), an inner one
over just the blocks that it can see, with an online softmax (FlashAttention-2, arXiv 2307.08691).
Holds one block of scores, [B,H,block,block] floats. Same arguments and results as `blocks`.

Legend: R = query heads a key head, C = queries of the block, J = keys of the block.
"""

import jax
import jax.numpy as jnp

from effarch.kernels.attention import blocks, masks


def forward(q_BGRTK, k_BGSK, v_BGSV, segments, opts):
    """Returns o [B,G,R,T,V] and each row's log-sum-exp [B,G,R,T], +inf where nothing is seen."""
    T = q_BGRTK.shape[3]
    q_BGRTK, k_BGSK, v_BGSV, q_ids, kv_ids = _pad(q_BGRTK, k_BGSK, v_BGSV, segments, opts.block)
    num_kv = k_BGSK.shape[2] // opts.block

    def query_block(i):
        q_BGRCK = _cut(q_BGRTK, i, 3, opts)
        first, last = _key_blocks(opts, i, num_kv)

        def step(j, carry):
            o_BGRCV, peak_BGRC, total_BGRC = carry
            kt_BGKJ = jnp.swapaxes(_cut(k_BGSK, j, 2, opts), 2, 3)
            s_BGRCJ = blocks.scores("bgrck,bgkj->bgrcj", q_BGRCK, kt_BGKJ, opts)
            seen_BCJ = _seen(opts, i, j, q_ids, kv_ids)
            s_BGRCJ = jnp.where(seen_BCJ[:, None, None], s_BGRCJ, -jnp.inf)
            new_peak = jnp.maximum(peak_BGRC, jnp.max(s_BGRCJ, axis=-1))
            keep_BGRC = jnp.exp(peak_BGRC - new_peak)
            p_BGRCJ = jnp.exp(s_BGRCJ - new_peak[..., None])
            o_BGRCV = o_BGRCV * keep_BGRC[..., None] + blocks.product(
                "bgrcj,bgjv->bgrcv", p_BGRCJ.astype(v_BGSV.dtype), _cut(v_BGSV, j, 2, opts)
            )
            return o_BGRCV, new_peak, total_BGRC * keep_BGRC + jnp.sum(p_BGRCJ, axis=-1)

        rows = q_BGRCK.shape[:-1]
        lowest = jnp.full(rows, jnp.finfo(jnp.float32).min)  # finite: -inf - -inf would be NaN
        start = (jnp.zeros((*rows, v_BGSV.shape[-1])), lowest, jnp.zeros(rows))
        o_BGRCV, peak_BGRC, total_BGRC = jax.lax.fori_loop(first, last, step, start)
        lse_BGRC = jnp.where(total_BGRC == 0, jnp.inf, peak_BGRC + jnp.log(total_BGRC))
        o_BGRCV /= jnp.where(total_BGRC == 0, 1.0, total_BGRC)[..., None]
        return o_BGRCV.astype(q_BGRTK.dtype), lse_BGRC

    num_q = q_BGRTK.shape[3] // opts.block
    outs, lses = jax.lax.map(query_block, jnp.arange(num_q))
    return _join(outs, 3)[:, :, :, :T], _join(lses, 3)[..., :T]


def backward(q_BGRTK, k_BGSK, v_BGSV, segments, o_BGRTV, lse_BGRT, do_BGRTV, opts):
    """Returns float32 dq [B,G,R,T,K], dk [B,G,S,K], dv [B,G,S,V]."""
    T, S = q_BGRTK.shape[3], k_BGSK.shape[2]
    delta_BGRT = _fill(blocks.row_dot(do_BGRTV, o_BGRTV), 3, opts.block)
    lse_BGRT = _fill(lse_BGRT, 3, opts.block, jnp.inf)
    do_BGRTV = _fill(do_BGRTV, 3, opts.block)
    q_BGRTK, k_BGSK, v_BGSV, q_ids, kv_ids = _pad(q_BGRTK, k_BGSK, v_BGSV, segments, opts.block)
    qt_BGKRT, dot_BGVRT, kt_BGKS = jax.lax.optimization_barrier(
        (
            jnp.moveaxis(q_BGRTK, -1, 2),
            jnp.moveaxis(do_BGRTV, -1, 2),
            jnp.swapaxes(k_BGSK, 2, 3),
        )
    )
    num_q = q_BGRTK.shape[3] // opts.block

    def key_block(dqt_BGKRT, j):
        k_BGJK, v_BGJV = _cut(k_BGSK, j, 2, opts), _cut(v_BGSV, j, 2, opts)
        kt_BGKJ = _cut(kt_BGKS, j, 3, opts)
        first, last = _query_blocks(opts, j, num_q)

        def step(i, carry):
            dqt_BGKRT, dk_BGJK, dv_BGJV = carry
            seen_BCJ = _seen(opts, i, j, q_ids, kv_ids)
            p_BGJRC, ds_BGJRC = blocks.transposed_gradients(
                k_BGJK,
                v_BGJV,
                _cut(qt_BGKRT, i, 4, opts),
                _cut(dot_BGVRT, i, 4, opts),
                _cut(lse_BGRT, i, 3, opts),
                _cut(delta_BGRT, i, 3, opts),
                jnp.swapaxes(seen_BCJ, 1, 2)[:, None, :, None],
                opts,
            )
            dv_BGJV += blocks.product("bgjrc,bgrcv->bgjv", p_BGJRC, _cut(do_BGRTV, i, 3, opts))
            dk_BGJK += blocks.product("bgjrc,bgrck->bgjk", ds_BGJRC, _cut(q_BGRTK, i, 3, opts))
            more = blocks.product("bgkj,bgjrc->bgkrc", kt_BGKJ, ds_BGJRC)
            more += _cut(dqt_BGKRT, i, 4, opts)
            start = (0, 0, 0, 0, i * opts.block)
            return jax.lax.dynamic_update_slice(dqt_BGKRT, more, start), dk_BGJK, dv_BGJV

        zeros = (jnp.zeros(k_BGJK.shape, jnp.float32), jnp.zeros(v_BGJV.shape, jnp.float32))
        dqt_BGKRT, dk_BGJK, dv_BGJV = jax.lax.fori_loop(first, last, step, (dqt_BGKRT, *zeros))
        return dqt_BGKRT, (dk_BGJK, dv_BGJV)

    dqt_BGKRT, (dks, dvs) = jax.lax.scan(
        key_block,
        jnp.zeros(qt_BGKRT.shape, jnp.float32),
        jnp.arange(k_BGSK.shape[2] // opts.block),
    )
    dq_BGRTK = jnp.moveaxis(dqt_BGKRT, 2, -1)[:, :, :, :T]
    return dq_BGRTK, _join(dks, 2)[:, :, :S], _join(dvs, 2)[:, :, :S]


def _pad(q_BGRTK, k_BGSK, v_BGSV, segments, block):
    """Both times filled up to whole blocks; segment ids such that nobody sees the added keys."""
    B, T, S = q_BGRTK.shape[0], q_BGRTK.shape[3], k_BGSK.shape[2]
    if segments is None:
        segments = jnp.ones((B, T), jnp.int32), jnp.ones((B, S), jnp.int32)
    q_ids, kv_ids = segments
    kv_ids = masks.hide_padding(_fill(kv_ids, 1, block))
    padded = _fill(q_BGRTK, 3, block), _fill(k_BGSK, 2, block), _fill(v_BGSV, 2, block)
    return *padded, _fill(q_ids, 1, block), kv_ids


def _fill(x: jax.Array, axis: int, block: int, value=0) -> jax.Array:
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, -x.shape[axis] % block)
    return jnp.pad(x, widths, constant_values=value)


def _cut(x: jax.Array, i: jax.Array, axis: int, opts: masks.Options) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(x, i * opts.block, opts.block, axis)


def _join(stacked: jax.Array, axis: int) -> jax.Array:
    """[n, ..., block, ...] -> [..., n * block, ...] with the joined axis at `axis`."""
    x = jnp.moveaxis(stacked, 0, axis)
    return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])


def _key_blocks(opts, i, num_kv):
    """First and one past the last block of keys that query block i may see."""
    first = 0 if opts.window is None else (i * opts.block - opts.window + 1) // opts.block
    last = jnp.minimum(i + 1, num_kv) if opts.causal else num_kv
    return jnp.maximum(first, 0), last


def _query_blocks(opts, j, num_q):
    """First and one past the last block of queries that may see key block j."""
    last = num_q
    if opts.window is not None:
        last = jnp.minimum(num_q, ((j + 1) * opts.block + opts.window - 2) // opts.block + 1)
    return (j if opts.causal else 0), last


def _seen(opts, i, j, q_ids, kv_ids):
    """Mask [B, C, J] of query block i and key block j."""
    within = jnp.arange(opts.block)
    q_index, kv_index = i * opts.block + within, j * opts.block + within
    seen = masks.in_order(opts, q_index[None, :, None], kv_index[None, None, :])
    same = _cut(q_ids, i, 1, opts)[:, :, None] == _cut(kv_ids, j, 1, opts)[:, None, :]
    return seen & same
