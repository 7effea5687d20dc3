"""The bodies of the GPU kernels of attention: forward, and backward by keys and by queries.

    s_ij = log2(e) c tanh(scale q_i . k_j / c)    p_ij = 2^(s_ij - lse_i)    o_i = sum_j p_ij v_j
    dv_j = sum_i p_ij do_i      ds_ij = scale p_ij (do_i . v_j - delta_i) (1 - tanh^2)
    dk_j = sum_i ds_ij q_i      dq_i = sum_j ds_ij k_j                 delta_i = do_i . o_i

FlashAttention-2 (arXiv 2307.08691). Blocks that nobody sees are not visited; a query that sees no key
has lse = inf, so that all its p are 0.
Legend: C queries of a block, J keys of a block.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from effarch.kernels.attention import masks

BLOCK = 64
"""C and J; forward has twice as many queries."""

_LOG2_E = math.log2(math.e)
_LOWEST = -1e30  # below all scores, and finite: -inf - -inf would be NaN

dot = functools.partial(jnp.dot, preferred_element_type=jnp.float32)


class Plan(NamedTuple):
    """What is known while tracing; T and S are the lengths that were filled up."""

    options: masks.Options
    queries: int  # T
    keys: int  # S
    heads: int  # of queries
    segmented: bool
    interpret: bool


def forward(plan, q, k, v, *rest):
    """Block [C,K] of q, whole rows of k and v, ids; writes o [C,V] and lse [C]."""
    ids, kv_ids, o, lse = rest if plan.segmented else (None, None, *rest)
    size = q.shape[0]
    start = pl.program_id(0) * size
    queries, q_ids = q[...], None if ids is None else ids[...]
    first, last = _key_blocks(plan, start, size)

    def step(j, carry):
        total, peak, weight = carry
        own = pl.ds(j * BLOCK, BLOCK)
        s, _ = _scores(plan, dot(queries, k[own, :].T))
        row, column = _positions((size, BLOCK), start, j * BLOCK)
        s = jnp.where(_seen(plan, row, column, q_ids, kv_ids, own), s, -jnp.inf)
        higher = jnp.maximum(peak, jnp.max(s, axis=1))
        keep, p = jnp.exp2(peak - higher), jnp.exp2(s - higher[:, None])
        total = keep[:, None] * total + dot(p.astype(v.dtype), v[own, :])
        return total, higher, keep * weight + jnp.sum(p, axis=1)

    zeros = jnp.zeros((size, v.shape[1]), jnp.float32)
    begin = (zeros, jnp.full(size, _LOWEST, jnp.float32), jnp.zeros(size, jnp.float32))
    total, peak, weight = jax.lax.fori_loop(first, last, step, begin)
    is_empty = weight == 0
    weight = jnp.where(is_empty, 1.0, weight)
    o[...] = (total / weight[:, None]).astype(o.dtype)
    lse[...] = jnp.where(is_empty, jnp.inf, peak + jnp.log2(weight))


def backward_keys(plan, q, k, v, d_o, lse, delta, *rest):
    """Whole rows of q, d_o, lse, delta; blocks [J,K] and [J,V] of k and v; writes d_k and d_v."""
    ids, kv_ids, d_k, d_v = rest if plan.segmented else (None, None, *rest)
    start = pl.program_id(0) * BLOCK
    keys, values, k_ids = k[...], v[...], None if kv_ids is None else kv_ids[...]
    first, last = _query_blocks(plan, start)

    def step(i, carry):
        to_k, to_v = carry
        own = pl.ds(i * BLOCK, BLOCK)
        queries, flowing = q[own, :], d_o[own, :]
        s, slope = _scores(plan, dot(keys, queries.T))
        column, row = _positions((BLOCK, BLOCK), start, i * BLOCK)
        seen = _seen(plan, row, column, k_ids, ids, own)
        p = jnp.exp2(jnp.where(seen, s, -jnp.inf) - lse[own][None, :])
        d_s = p * (dot(values, flowing.T) - delta[own][None, :]) * slope
        to_v += dot(p.astype(v.dtype), flowing)
        return to_k + dot(d_s.astype(q.dtype), queries), to_v

    zeros = (jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32))
    to_k, to_v = jax.lax.fori_loop(first, last, step, zeros)
    d_k[...], d_v[...] = to_k.astype(d_k.dtype), to_v.astype(d_v.dtype)


def backward_queries(plan, q, k, v, d_o, lse, delta, *rest):
    """Blocks of q, d_o [C,...], lse, delta [C]; whole rows of k and v; writes d_q [C,K]."""
    ids, kv_ids, d_q = rest if plan.segmented else (None, None, *rest)
    start = pl.program_id(0) * BLOCK
    queries, flowing, q_ids = q[...], d_o[...], None if ids is None else ids[...]
    peak, shift = lse[...], delta[...]
    first, last = _key_blocks(plan, start, BLOCK)

    def step(j, total):
        own = pl.ds(j * BLOCK, BLOCK)
        keys = k[own, :]
        s, slope = _scores(plan, dot(queries, keys.T))
        row, column = _positions((BLOCK, BLOCK), start, j * BLOCK)
        seen = _seen(plan, row, column, q_ids, kv_ids, own)
        p = jnp.exp2(jnp.where(seen, s, -jnp.inf) - peak[:, None])
        d_s = p * (dot(flowing, v[own, :].T) - shift[:, None]) * slope
        return total + dot(d_s.astype(k.dtype), keys)

    total = jax.lax.fori_loop(first, last, step, jnp.zeros(q.shape, jnp.float32))
    d_q[...] = total.astype(d_q.dtype)


def _scores(plan, products):
    """s, and what ds has as factors beside p (do . v - delta)."""
    scale, softcap = plan.options.scale, plan.options.softcap
    if softcap is None:
        return products * (scale * _LOG2_E), scale
    bent = jnp.tanh(products * (scale / softcap))
    return bent * (softcap * _LOG2_E), scale * (1 - bent * bent)


def _positions(shape, row_start, column_start):
    starts = (row_start, column_start)
    return [jax.lax.broadcasted_iota(jnp.int32, shape, axis) + starts[axis] for axis in (0, 1)]


def _seen(plan, row, column, ids, others, own):
    """Whether query `row` sees key `column`; `ids` lie on axis 0, `others[own]` on axis 1."""
    seen = masks.in_order(plan.options, row, column)
    if ids is None:
        return seen
    return seen & (ids[:, None] == others[own][None, :])


def _key_blocks(plan, start, size):
    """First and one past the last block of keys that the queries from `start` may see."""
    first, last = 0, plan.keys // BLOCK
    if plan.options.causal:
        last = jnp.minimum(last, (start + size + BLOCK - 1) // BLOCK)
    if plan.options.window is not None:
        first = jnp.maximum(start - plan.options.window + 1, 0) // BLOCK
    return first, last


def _query_blocks(plan, start):
    """First and one past the last block of queries that may see the keys from `start`."""
    first, last = 0, plan.queries // BLOCK
    if plan.options.causal:
        first = start // BLOCK
    if plan.options.window is not None:
        last = jnp.minimum(last, (start + BLOCK + plan.options.window + BLOCK - 2) // BLOCK)
    return first, last
