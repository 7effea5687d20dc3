"""Blockwise attention, forward and backward, unrolled: a static list of query or key blocks.

For sequences of few blocks. A query block sees its whole row of keys at once, so there is no online
softmax. The backward goes over key blocks on transposed scores, so that the left operand of every
product is row-major and contracted over its last axes; only arrays of width K or V are transposed,
never scores. XLA:CPU is fast on just that form. The barriers keep XLA from folding those transposes
into the products, which it then could not run in bfloat16.

Legend: R = query heads a key head, C = queries of the block, J = keys of the block.
"""

import jax
import jax.numpy as jnp

from effarch.kernels.attention import masks


def forward(q_BGRTK, k_BGSK, v_BGSV, segments, opts):
    """Returns o [B,G,R,T,V] and the log-sum-exp of each row [B,G,R,T], +inf where nothing is seen.

    `segments` is None or (ids of queries [B,T], ids of keys [B,S] from `masks.hide_padding`).
    """
    T, S = q_BGRTK.shape[3], k_BGSK.shape[2]
    kt_BGKS = jax.lax.optimization_barrier(jnp.swapaxes(k_BGSK, 2, 3))
    outs, lses = [], []
    for start in range(0, T, opts.block):
        stop = min(start + opts.block, T)
        low, high = masks.key_range(opts, start, stop, S)
        s_BGRCJ = scores(
            "bgrck,bgkj->bgrcj", q_BGRTK[:, :, :, start:stop], kt_BGKS[..., low:high], opts
        )
        seen_BCJ = _seen(opts, (start, stop), (low, high), segments)
        if seen_BCJ is not None:
            s_BGRCJ = jnp.where(seen_BCJ[:, None, None], s_BGRCJ, -jnp.inf)
        o_BGRCV, lse_BGRC = softmax_rows(s_BGRCJ, v_BGSV[:, :, low:high], segments is not None)
        outs.append(o_BGRCV.astype(q_BGRTK.dtype))
        lses.append(lse_BGRC)
    return jnp.concatenate(outs, axis=3), jnp.concatenate(lses, axis=3)


def backward(q_BGRTK, k_BGSK, v_BGSV, segments, o_BGRTV, lse_BGRT, do_BGRTV, opts):
    """Returns float32 dq [B,G,R,T,K], dk [B,G,S,K], dv [B,G,S,V]."""
    T, S = q_BGRTK.shape[3], k_BGSK.shape[2]
    delta_BGRT = row_dot(do_BGRTV, o_BGRTV)
    qt_BGKRT, dot_BGVRT, kt_BGKS = jax.lax.optimization_barrier(
        (
            jnp.moveaxis(q_BGRTK, -1, 2),
            jnp.moveaxis(do_BGRTV, -1, 2),
            jnp.swapaxes(k_BGSK, 2, 3),
        )
    )
    dqt_BGKRT = jnp.zeros(qt_BGKRT.shape, jnp.float32)
    dks, dvs = [], []
    for start in range(0, S, opts.block):
        stop = min(start + opts.block, S)
        low, high = masks.query_range(opts, start, stop, T)
        seen_BCJ = _seen(opts, (low, high), (start, stop), segments)
        p_BGJRC, ds_BGJRC = transposed_gradients(
            k_BGSK[:, :, start:stop],
            v_BGSV[:, :, start:stop],
            qt_BGKRT[..., low:high],
            dot_BGVRT[..., low:high],
            lse_BGRT[..., low:high],
            delta_BGRT[..., low:high],
            None if seen_BCJ is None else jnp.swapaxes(seen_BCJ, 1, 2)[:, None, :, None],
            opts,
        )
        dvs.append(product("bgjrc,bgrcv->bgjv", p_BGJRC, do_BGRTV[:, :, :, low:high]))
        dks.append(product("bgjrc,bgrck->bgjk", ds_BGJRC, q_BGRTK[:, :, :, low:high]))
        dqt_BGKRT = dqt_BGKRT.at[..., low:high].add(
            product("bgkj,bgjrc->bgkrc", kt_BGKS[..., start:stop], ds_BGJRC)
        )
    dqt_BGKRT, dk_BGSK, dv_BGSV = jax.lax.optimization_barrier(
        (dqt_BGKRT, jnp.concatenate(dks, axis=2), jnp.concatenate(dvs, axis=2))
    )
    return jnp.moveaxis(dqt_BGKRT, 2, -1), dk_BGSK, dv_BGSV


def product(spec: str, x: jax.Array, y: jax.Array) -> jax.Array:
    """An einsum on operands of one dtype, summed in float32."""
    return jnp.einsum(spec, x, y, preferred_element_type=jnp.float32)


def scores(spec: str, x: jax.Array, y: jax.Array, opts: masks.Options) -> jax.Array:
    """Scaled and capped scores in float32."""
    s = product(spec, x, y) * opts.scale
    return s if opts.softcap is None else opts.softcap * jnp.tanh(s / opts.softcap)


def row_dot(x: jax.Array, y: jax.Array) -> jax.Array:
    """sum_v x_v y_v over the last axis, in float32."""
    return jnp.sum(x.astype(jnp.float32) * y.astype(jnp.float32), axis=-1)


def softmax_rows(s_BGRCJ, v_BGJV, may_be_empty: bool):
    """softmax(s) v and the log-sum-exp of each row; a row of -inf gives 0 and +inf."""
    peak_BGRC = jax.lax.stop_gradient(jnp.max(s_BGRCJ, axis=-1))
    if may_be_empty:
        peak_BGRC = jnp.where(peak_BGRC == -jnp.inf, 0.0, peak_BGRC)
    p_BGRCJ = jnp.exp(s_BGRCJ - peak_BGRC[..., None])
    total_BGRC = jnp.sum(p_BGRCJ, axis=-1)
    o_BGRCV = product("bgrcj,bgjv->bgrcv", p_BGRCJ.astype(v_BGJV.dtype), v_BGJV)
    lse_BGRC = peak_BGRC + jnp.log(total_BGRC)
    if may_be_empty:
        lse_BGRC = jnp.where(total_BGRC == 0, jnp.inf, lse_BGRC)
        total_BGRC = jnp.where(total_BGRC == 0, 1.0, total_BGRC)
    return o_BGRCV / total_BGRC[..., None], lse_BGRC


def transposed_gradients(
    k_BGJK, v_BGJV, qt_BGKRC, dot_BGVRC, lse_BGRC, delta_BGRC, seen_BGJRC, opts
):
    """Transposed probabilities p^T and the gradient of the raw scores ds^T = d loss / d (q k^T)^T.

    `seen_BGJRC` broadcasts to [B,G,J,R,C]; None: every pair is seen. Both results are in k's dtype.
    """
    s_BGJRC = scores("bgjk,bgkrc->bgjrc", k_BGJK, qt_BGKRC, opts)
    masked_BGJRC = s_BGJRC if seen_BGJRC is None else jnp.where(seen_BGJRC, s_BGJRC, -jnp.inf)
    p_BGJRC = jnp.exp(masked_BGJRC - lse_BGRC[:, :, None])
    dp_BGJRC = product("bgjv,bgvrc->bgjrc", v_BGJV, dot_BGVRC)
    ds_BGJRC = p_BGJRC * (dp_BGJRC - delta_BGRC[:, :, None]) * opts.scale
    if opts.softcap is not None:
        ds_BGJRC *= 1 - jnp.square(s_BGJRC / opts.softcap)
    return p_BGJRC.astype(k_BGJK.dtype), ds_BGJRC.astype(k_BGJK.dtype)


def _seen(opts, q_range, kv_range, segments):
    """Mask [B or 1, C, J] of a block, None if all of it is seen."""
    seen = None
    if not masks.every_pair_in_order(opts, q_range, kv_range):
        q_index, kv_index = jnp.arange(*q_range), jnp.arange(*kv_range)
        seen = masks.in_order(opts, q_index[None, :, None], kv_index[None, None, :])
    if segments is not None:
        q_ids, kv_ids = segments
        same = q_ids[:, slice(*q_range), None] == kv_ids[:, None, slice(*kv_range)]
        seen = same if seen is None else seen & same
    return seen
