"""The gradient of linear attention: one Pallas TPU kernel, from the last chunk to the first.

Of a chunk with the factors of the gates and the saved entering state S, from dO' = scale dO and the
gradient dS' of the leaving state:

    dV = P^T dO' + (write K) dS'           dP = lower(dO' V^T)
    dQ = (dP pairs) K + read (dO' S^T)     dK = (dP pairs)^T Q + write (V dS'^T)
    dS = carry dS' + (read Q)^T dO'

Gates: what flows to the logarithm of a factor is the factor times its gradient. Legend as in `forward`.
"""

import functools

import jax.numpy as jnp
from jax.experimental import pallas as pl

from effarch.kernels.chunked import (
    tpu_blocks,
    tpu_channel_gates,
    tpu_head_gates,
    tpu_heads,
    tpu_rows,
)
from effarch.kernels.chunked.tpu_heads import dot, dot_transposed, lanes_of

_HEADS_A_ROUND = 2


def backward(q, k, v, g, marks, states, d_o, d_final, plan: tpu_rows.Plan):
    """Gradients of q, k [B,T,H*K], v [B,T,HV*V], g [B,N,J,HB,C] or [B,T,HV*K] and initial [B,HV,K,V].

    Arguments as those and the results of `forward`.
    """
    batch, chunks = marks.shape[:2]
    heads, key, value = plan.heads, plan.key, plan.value
    groups = d_final.shape[1] // heads

    def at(n):
        return chunks - 1 - n

    keys = tpu_blocks.tokens(plan, heads // plan.group * key, at)
    values = tpu_blocks.tokens(plan, heads * value, at)
    inputs = [
        *((keys, q), (keys, k), (values, v), (tpu_blocks.sums(plan, g, at), g)),
        *((tpu_blocks.marks(plan, at), marks), (tpu_blocks.per_head(plan, key, value, at), states)),
        *((values, d_o), (tpu_blocks.whole(), d_final)),
    ]
    outputs = [
        *((keys, q.shape, q.dtype), (keys, k.shape, k.dtype), (values, v.shape, v.dtype)),
        (tpu_blocks.state(plan), d_final.shape, jnp.float32),
    ]
    if plan.per_channel:
        outputs.append((tpu_blocks.tokens(plan, heads * key, at), g.shape[1:], jnp.float32))
    else:
        for rows in (heads, tpu_rows.LANES):
            logs = (batch, chunks, groups, rows, plan.chunk)
            outputs.append((tpu_blocks.per_token(plan, rows, at), logs, jnp.float32))
    d_q, d_k, d_v, d_initial, *d_gates = tpu_blocks.call(
        *(_kernel, plan, (batch, groups, chunks), inputs, outputs),
        flops=(50 if plan.per_channel else 6) * plan.chunk * key + 10 * key * value,
        name="linear_attention_backward",
    )
    if plan.per_channel:
        (d_g,) = d_gates
    else:
        (d_g,) = tpu_head_gates.gradients(*d_gates, 2, plan)
    return d_q, d_k, d_v, d_g, d_initial


def _kernel(plan, *refs):
    q_ref, k_ref, v_ref, g_ref, marks_ref, states_ref, d_o_ref, d_final_ref = refs[:8]
    d_q_ref, d_k_ref, d_v_ref, d_state_ref, *d_gates_refs = refs[8:]
    row, group, step = (pl.program_id(x) for x in range(3))

    @pl.when(step == 0)
    def _():
        tpu_blocks.load_state(plan, d_final_ref, d_state_ref, row, group)

    factors = tpu_channel_gates.gates(g_ref, None, marks_ref[...], plan)
    shared = tpu_heads.SharedKeys(plan, d_q_ref, d_k_ref)
    columns = []

    def pull_back(head):
        own, own_keys = lanes_of(head, plan.value), lanes_of(head // plan.group, plan.key)
        q, k, v = q_ref[:, own_keys], k_ref[:, own_keys], v_ref[:, own]
        d_o, d_state = (d_o_ref[:, own] * plan.scale).astype(q.dtype), d_state_ref[0, head]
        inputs = (q, k, v, states_ref[head], d_o, d_state, factors, head)
        if plan.per_channel:
            sums = tpu_channel_gates.sums_of(g_ref, head, plan)
            d_q, d_k, d_v, d_state, d_g = yield from _pull_back_channels(*inputs, sums)
            d_gates_refs[0][:, lanes_of(head, plan.key)] = d_g
        else:
            d_q, d_k, d_v, d_state, log_row, log_columns = yield from _pull_back_head(*inputs)
            d_gates_refs[0][head : head + 1] = log_row
            columns.append(log_columns)
        d_v_ref[:, own] = d_v.astype(d_v_ref.dtype)
        d_state_ref[0, head] = d_state
        shared.add(head, d_q, d_k)

    heads = range(plan.heads)
    tpu_heads.interleave([(head // _HEADS_A_ROUND, pull_back(head)) for head in heads])
    if columns:
        d_gates_refs[1][...] = functools.reduce(jnp.add, columns).T


def _pull_back_head(q, k, v, state, d_o, d_state, factors, head):
    """dQ, dK, dV, dS and the logarithms' gradients, for one decay a head."""
    dtype, (chunk, width) = q.dtype, q.shape
    products = dot_transposed(q, k)
    outer = dot_transposed(d_o, jnp.concatenate([v, state]))
    yield
    pairs, read = factors.pairs_and_read(head)
    read, write = read[:, :width], factors.write_column(head)[:, :width]
    attend, d_attend = products * pairs, outer[:, :chunk] * pairs
    yield
    through = _Through(q, k, v, outer, d_o, d_state, attend, read, write)
    yield
    narrow = d_attend.astype(dtype)
    d_q = through.d_q + dot(narrow, k)
    d_k = through.d_k + dot(narrow.T, q)
    log_row, log_columns = yield from factors.log_gradients(
        *(head, d_attend * products, through.d_q * q, through.d_k * k, (), state, d_state, dtype)
    )
    d_state = factors.carry(head) * d_state + through.d_state
    yield
    return d_q, d_k, through.d_v, d_state, log_row, log_columns


def _pull_back_channels(q, k, v, state, d_o, d_state, factors, head, sums):
    """dQ, dK, dV, dS and dg, for decays per channel; see the delta rule's `channel_backward`."""
    dtype, chunk = q.dtype, q.shape[0]
    attend, *_ = yield from factors.parts(q, k, head, sums, corrects=False)
    outer = dot_transposed(d_o, jnp.concatenate([v, state]))
    yield
    read, write = factors.read(sums), factors.write(sums, head)
    through = _Through(q, k, v, outer, d_o, d_state, attend, read, write)
    yield
    d_attend = outer[:, :chunk] * factors.weights(head)
    d_alone = jnp.where(factors.is_diagonal, d_attend, 0).astype(dtype)
    (d_q,), d_k = yield from factors.pull_back_pairs((q,), k, (d_attend,), (through.d_q,), sums)
    carried = factors.carry(sums) * jnp.sum((state * d_state).T, axis=0, keepdims=True)
    d_g = tpu_channel_gates.sum_gates(q * d_q - k * d_k, k * through.d_k, dtype) + carried
    yield
    d_q += dot(d_alone, k)
    d_k += through.d_k + dot(d_alone, q)
    d_state = factors.carry_column(sums) * d_state + through.d_state
    yield
    return d_q, d_k, through.d_v, d_state, d_g


class _Through:
    """What flows through the states (d_q, d_k, d_state), and the whole of d_v; float32."""

    def __init__(self, q, k, v, outer, d_o, d_state, attend, read, write):
        dtype, chunk = q.dtype, q.shape[0]
        narrow = d_state.astype(dtype)
        both = jnp.concatenate([attend.astype(dtype).T, (k * write).astype(dtype)], 1)
        self.d_v = dot(both, jnp.concatenate([d_o, narrow]))
        self.d_q = outer[:, chunk:] * read
        self.d_k = dot_transposed(v, narrow) * write
        self.d_state = dot((q * read).astype(dtype).T, d_o)
