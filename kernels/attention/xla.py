"""Softmax attention in plain JAX, blockwise, for any device.

Training (no positions) has its own backward from the saved log-sum-exp of each row, so that no
scores are kept: `blocks` for few blocks, `loops` for many. Decoding with positions is plain
autodiff. Batch and heads stay separate axes throughout, so either may be sharded. Under remat, the
saved arrays are named "attention_out" and "attention_lse".

Legend: R = query heads that share a key head (H = G * R).
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from effarch.kernels import varying
from effarch.kernels.attention import blocks, loops, masks

_UNROLL = 16  # at most so many blocks are written out; beyond, loops
_CACHE_BLOCK = 512  # queries of a block when decoding or prefilling with positions


def attention(
    q,
    k,
    v,
    *,
    causal,
    window,
    softcap,
    segment_ids,
    kv_segment_ids,
    q_positions,
    kv_positions,
    scale,
) -> jax.Array:
    """See `api.attention`."""
    q, k, v, segment_ids, kv_segment_ids, q_positions, kv_positions = varying.align(
        [q, k, v, segment_ids, kv_segment_ids, q_positions, kv_positions]
    )
    B, T, H, K = q.shape
    G = k.shape[2]
    opts = masks.Options(causal, window, softcap, scale, block_size(max(T, k.shape[1])))
    q_BGRTK = jnp.moveaxis(q.reshape(B, T, G, H // G, K), 1, 3)
    k_BGSK, v_BGSV = jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2)
    segments = None
    if segment_ids is not None:
        segments = segment_ids, masks.hide_padding(kv_segment_ids)
    if q_positions is None:
        o_BGRTV = _train(q_BGRTK, k_BGSK, v_BGSV, segments, opts)
    else:
        positions = q_positions, kv_positions
        o_BGRTV = _decode(q_BGRTK, k_BGSK, v_BGSV, segments, positions, opts)
    return jnp.moveaxis(o_BGRTV, 3, 1).reshape(B, T, H, v.shape[-1])


def block_size(longest: int) -> int:
    """Queries (backward: keys) of a block: the fastest of 64 ... 512 on a CPU at 256 and 1024."""
    return 128 if longest <= 512 else 256 if longest <= 4096 else 512


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _train(q_BGRTK, k_BGSK, v_BGSV, segments, opts):
    return _form(q_BGRTK, k_BGSK, opts).forward(q_BGRTK, k_BGSK, v_BGSV, segments, opts)[0]


def _train_fwd(q_BGRTK, k_BGSK, v_BGSV, segments, opts):
    form = _form(q_BGRTK, k_BGSK, opts)
    o_BGRTV, lse_BGRT = form.forward(q_BGRTK, k_BGSK, v_BGSV, segments, opts)
    o_BGRTV = checkpoint_name(o_BGRTV, "attention_out")
    lse_BGRT = checkpoint_name(lse_BGRT, "attention_lse")
    return o_BGRTV, (q_BGRTK, k_BGSK, v_BGSV, segments, o_BGRTV, lse_BGRT)


def _train_bwd(opts, saved, do_BGRTV):
    q_BGRTK, k_BGSK, v_BGSV, *_ = saved
    dq, dk, dv = _form(q_BGRTK, k_BGSK, opts).backward(*saved, do_BGRTV, opts)
    return dq.astype(q_BGRTK.dtype), dk.astype(k_BGSK.dtype), dv.astype(v_BGSV.dtype), None


_train.defvjp(_train_fwd, _train_bwd)


def _form(q_BGRTK, k_BGSK, opts):
    longest = max(q_BGRTK.shape[3], k_BGSK.shape[2])
    return blocks if longest <= _UNROLL * opts.block else loops


def _decode(q_BGRTK, k_BGSK, v_BGSV, segments, positions, opts):
    """Queries against the slots of a cache, in blocks of queries."""
    q_ids, kv_ids = (None, None) if segments is None else segments
    q_positions, kv_positions = positions

    def rows(args):
        q_BGRCK, positions_BC, ids_BC = args
        s_BGRCS = blocks.scores("bgrck,bgsk->bgrcs", q_BGRCK, k_BGSK, opts)
        kv_BCS = kv_positions[:, None, :]
        seen_BCS = (kv_BCS >= 0) & masks.in_order(opts, positions_BC[:, :, None], kv_BCS)
        if ids_BC is not None:
            seen_BCS &= ids_BC[:, :, None] == kv_ids[:, None, :]
        s_BGRCS = jnp.where(seen_BCS[:, None, None], s_BGRCS, -jnp.inf)
        o_BGRCV, _ = blocks.softmax_rows(s_BGRCS, v_BGSV, may_be_empty=True)
        return o_BGRCV.astype(q_BGRCK.dtype)

    T = q_BGRTK.shape[3]
    if T <= _CACHE_BLOCK:
        return rows((q_BGRTK, q_positions, q_ids))
    pieces = [_pieces(q_BGRTK, 3), _pieces(q_positions, 1)]
    pieces.append(None if q_ids is None else _pieces(q_ids, 1))
    o_NBGRCV = jax.lax.map(jax.checkpoint(rows), tuple(pieces))
    o_BGRTV = jnp.moveaxis(o_NBGRCV, 0, 3).reshape(*q_BGRTK.shape[:3], -1, v_BGSV.shape[-1])
    return o_BGRTV[:, :, :, :T]


def _pieces(x: jax.Array, axis: int) -> jax.Array:
    """Time cut into blocks of queries, a new leading axis; the last is filled up with zeros."""
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, -x.shape[axis] % _CACHE_BLOCK)
    x = jnp.pad(x, widths)
    x = x.reshape(*x.shape[:axis], -1, _CACHE_BLOCK, *x.shape[axis + 1 :])
    return jnp.moveaxis(x, axis, 0)
