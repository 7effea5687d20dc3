"""Attention to few keys, chosen by a part of the channels: Spark Transformer, arXiv 2506.06644.

    a_ij = q_i[:P] . k_j[:P] / sqrt(P)           over the keys j that query i may see
    w_i  = softmax over the j with a_ij > theta_i        theta_i: `kernels.statistical_threshold`
    o_i  = sum_j w_ij softplus(q_i[P:] . k_j[P:] / sqrt(K - P)) v_j

A query that sees at most k keys attends to all; the key of the largest a_ij is always kept. The weights
are not normalized again. theta has no gradient: softmax does not change with a shift, and the choice is
constant almost everywhere. Not stated in the paper and chosen here: the scales, k counted for each
query head on its own, the largest key kept.

Legend: P = channels that choose, R = query heads that share a key head (H = G * R), C = queries at once.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from effarch.kernels.topk import api as topk
from effarch.models.context import Context
from effarch.models.layers import attend

_QUERIES = 128  # scores of so many queries are held at once; recomputed in the backward pass


def attend_in_row(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T G V"],
    ctx: Context,
    **options,
) -> tuple[Float[Array, "B T H V"], Int[Array, "B T H"]]:
    """Tokens attend to each other in the order of their row: (o, number of keys attended to).

    On a mesh each device has its rows, its heads and its queries, as in `attend.attend`.
    """
    is_split = ctx.layout is not None and ctx.layout.parts("time") > 1

    def on_pieces(q, k, v, segment_ids, kv_segment_ids):
        first = 0
        if is_split:
            first = jax.lax.axis_index(ctx.layout.mesh_axes(("time",))[0]) * q.shape[1]
        q_places = jnp.broadcast_to(first + jnp.arange(q.shape[1]), q.shape[:2])
        kv_places = jnp.broadcast_to(jnp.arange(k.shape[1]), k.shape[:2])
        if segment_ids is not None:  # padding sees nothing and is not seen
            q_places = jnp.where(segment_ids != 0, q_places, -1)
            kv_places = jnp.where(kv_segment_ids != 0, kv_places, -1)
        ids = (segment_ids, kv_segment_ids)
        return spark_attend(q, k, v, q_places, kv_places, *ids, **options)

    arrays = (q, k, v, ctx.segment_ids, ctx.segment_ids)
    inputs = (attend.QUERIES, attend.KEYS, attend.KEYS, ("batch", "time"), ("batch", None))
    outputs = (attend.QUERIES, ("batch", "time", "heads"))
    return ctx.local(on_pieces, arrays, inputs, outputs)


def spark_attend(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B S G K"],
    v: Float[Array, "B S G V"],
    q_places: Int[Array, "B T"],
    kv_places: Int[Array, "B S"],
    segment_ids: Int[Array, "B T"] | None = None,
    kv_segment_ids: Int[Array, "B S"] | None = None,
    *,
    split: int,
    num_keys: int,
    window: int | None = None,
) -> tuple[Float[Array, "B T H V"], Int[Array, "B T H"]]:
    """o in q's dtype (zeros where nothing is seen) and the number of keys attended to.

    Query i sees key j if 0 <= kv_places[j] <= q_places[i], nearer than `window` if given, both of one
    segment if given. `split` is P, `num_keys` is k. Scores, softmax and softplus are float32.
    """
    B, T, H, K = q.shape
    G = k.shape[2]
    q_BTGRK = q.reshape(B, T, G, H // G, K)
    rows = functools.partial(
        _rows, k, v, kv_places, kv_segment_ids, split=split, num_keys=num_keys, window=window
    )
    if T <= _QUERIES:
        o_BTGRV, kept_BTGR = rows(q_BTGRK, q_places, segment_ids)
    else:
        pieces = [_pieces(x) for x in (q_BTGRK, q_places)]
        pieces.append(None if segment_ids is None else _pieces(segment_ids))
        found = jax.lax.map(jax.checkpoint(lambda piece: rows(*piece)), tuple(pieces))
        o_BTGRV, kept_BTGR = (_joined(x, T) for x in found)
    return o_BTGRV.reshape(B, T, H, v.shape[-1]), kept_BTGR.reshape(B, T, H)


def _rows(k, v, kv_places, kv_ids, q_BCGRK, q_places, q_ids, *, split, num_keys, window):
    """Some queries against all keys: o [B,C,G,R,V] and the number of keys kept [B,C,G,R]."""
    age_BCS = q_places[:, :, None] - kv_places[:, None, :]
    seen_BCS = (kv_places[:, None, :] >= 0) & (age_BCS >= 0)
    if window is not None:
        seen_BCS &= age_BCS < window
    if q_ids is not None:
        seen_BCS &= q_ids[:, :, None] == kv_ids[:, None, :]
    seen = seen_BCS[:, None, None]

    def scores(channels):
        scale = (channels.stop - channels.start) ** -0.5
        parts = (q_BCGRK[..., channels], k[..., channels])
        return scale * jnp.einsum("bcgrk,bsgk->bgrcs", *parts, preferred_element_type=jnp.float32)

    choosing = jnp.where(seen, scores(slice(0, split)), -jnp.inf)
    theta = topk.statistical_threshold(choosing, num_keys, where=seen)
    best = jax.lax.stop_gradient(jnp.max(choosing, axis=-1, keepdims=True))
    kept = seen & ((choosing > theta) | (choosing == best))
    p_BGRCS = jnp.exp(jnp.where(kept, choosing - jnp.where(best > -jnp.inf, best, 0), -jnp.inf))
    total = jnp.sum(p_BGRCS, axis=-1, keepdims=True)
    p_BGRCS = p_BGRCS / jnp.where(total > 0, total, 1.0)
    p_BGRCS = p_BGRCS * jax.nn.softplus(scores(slice(split, q_BCGRK.shape[-1])))
    o_BCGRV = jnp.einsum(
        "bgrcs,bsgv->bcgrv", p_BGRCS.astype(v.dtype), v, preferred_element_type=jnp.float32
    )
    return o_BCGRV.astype(q_BCGRK.dtype), jnp.moveaxis(jnp.sum(kept, axis=-1), 3, 1)


def _pieces(x: jax.Array) -> jax.Array:
    """Queries [B,T,...] in blocks [N,B,C,...]; what is missing to a whole block sees nothing."""
    widths = [(0, 0)] * x.ndim
    widths[1] = (0, -x.shape[1] % _QUERIES)
    x = jnp.pad(x, widths, constant_values=-1 if jnp.issubdtype(x.dtype, jnp.integer) else 0)
    return jnp.moveaxis(x.reshape(x.shape[0], -1, _QUERIES, *x.shape[2:]), 1, 0)


def _joined(x: jax.Array, length: int) -> jax.Array:
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :length]
