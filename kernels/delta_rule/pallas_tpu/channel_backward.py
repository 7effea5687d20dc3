"""The gradient of the delta rule with decays per channel: one Pallas TPU kernel, last chunk first.

As `backward`, with read, write and carry vectors over the channels; L and P come saved. With the
gradients of the pairs dL and dP (times beta of the column), for each level of `tpu_channel_gates`, where
token i meets an earlier token j, with decays e_i to where they meet and f_j from there:

    dQ_i += e_i sum_j dP_ij k_j f_j            (reader)
    dK_i += e_i sum_j dL_ij k_j f_j            (reader)
    dK_j += f_j sum_i (dL_ij k_i + dP_ij q_i) e_i      (writer)

A gate of token t lies between every i >= t and j < t, so no further product is needed for it:

    d g_t = sum_(i >= t) (q dQ + k dK as reader - k dK as writer of a pair)_i
          + sum_(j < t) (k dK as writer of the state)_j + carry sum_v (S dS')_v

The diagonal of P has no decay and stays out. Legend as in `forward`.
"""

import functools

import jax.numpy as jnp
from jax.experimental import pallas as pl

from effarch.kernels.chunked import tpu_blocks, tpu_channel_gates, tpu_heads, tpu_rows
from effarch.kernels.chunked.tpu_heads import dot, dot_transposed, lanes_of, sum_lanes
from effarch.kernels.delta_rule.pallas_tpu import backward as head_backward
from effarch.kernels.delta_rule.pallas_tpu import forward

_HEADS_A_ROUND = 1


def backward(
    q, k, beta, g, marks, states, w, inverse, lower, attend, d_o, d_final, plan: tpu_rows.Plan
):
    """Gradients of q, k [B,T,H*K], v [B,T,HV*V], beta (times beta), g [B,T,HV*K] and initial.

    Arguments as those and the results of `forward`.
    """
    batch, chunks, groups = beta.shape[:3]
    heads, chunk, key, value = plan.heads, plan.chunk, plan.key, plan.value

    def at(n):
        return chunks - 1 - n

    keys = tpu_blocks.tokens(plan, heads // plan.group * key, at)
    values = tpu_blocks.tokens(plan, heads * value, at)
    gates = tpu_blocks.tokens(plan, heads * key, at)
    per_token = tpu_blocks.per_token(plan, heads, at)
    pairs = tpu_blocks.per_head(plan, chunk, chunk, at)
    inputs = [
        *((keys, q), (keys, k), (per_token, beta), (tpu_blocks.sums(plan, g, at), g)),
        (tpu_blocks.marks(plan, at), marks),
        (tpu_blocks.per_head(plan, key, value, at), states),
        (values, w),
        (tpu_blocks.per_head(plan, forward.BLOCK, chunk, at), inverse),
        *((pairs, lower), (pairs, attend), (values, d_o), (tpu_blocks.whole(), d_final)),
    ]
    outputs = [
        *((keys, q.shape, q.dtype), (keys, k.shape, k.dtype), (values, w.shape, w.dtype)),
        *((gates, g.shape[1:], jnp.float32), (per_token, beta.shape, jnp.float32)),
        (tpu_blocks.state(plan), d_final.shape, jnp.float32),
    ]
    d_q, d_k, d_v, d_g, beta_d_beta, d_initial = tpu_blocks.call(
        *(_kernel, plan, (batch, groups, chunks), inputs, outputs),
        flops=60 * chunk * key + 10 * chunk * value + 12 * key * value,
        name="delta_rule_channel_backward",
    )
    return d_q, d_k, d_v, beta_d_beta, d_g, d_initial


def _kernel(plan, *refs):
    q_ref, k_ref, beta_ref, g_ref, marks_ref, states_ref, w_ref, inverse_ref = refs[:8]
    lower_ref, attend_ref, d_o_ref, d_final_ref, *outputs = refs[8:]
    d_q_ref, d_k_ref, d_v_ref, d_g_ref, d_beta_ref, d_state_ref = outputs
    row, group, step = (pl.program_id(x) for x in range(3))
    heads = range(plan.heads)

    @pl.when(step == 0)
    def _():
        tpu_blocks.load_state(plan, d_final_ref, d_state_ref, row, group)

    factors = tpu_channel_gates.ChannelGates(beta_ref[...], marks_ref[...], plan)
    shared = tpu_heads.SharedKeys(plan, d_q_ref, d_k_ref)
    columns = []

    def pull_back(head):
        own, own_gates = lanes_of(head, plan.value), lanes_of(head, plan.key)
        own_keys = lanes_of(head // plan.group, plan.key)
        q, k = q_ref[:, own_keys], k_ref[:, own_keys]
        sums = tpu_channel_gates.sums_of(g_ref, head, plan)
        solving = (inverse_ref[head], lower_ref[head], attend_ref[head])
        d_o, d_state = (d_o_ref[:, own] * plan.scale).astype(q.dtype), d_state_ref[0, head]
        d_q, d_k, d_v, d_g, d_state = yield from _pull_back(
            q, k, w_ref[:, own], states_ref[head], *solving, d_o, d_state, factors, sums, head
        )
        columns.append(sum_lanes([(head, (w_ref[:, own] * d_v).astype(q.dtype))], q.dtype))
        d_v_ref[:, own] = d_v.astype(d_v_ref.dtype)
        d_g_ref[:, own_gates] = d_g
        d_state_ref[0, head] = d_state
        shared.add(head, d_q, d_k)

    tpu_heads.interleave([(head // _HEADS_A_ROUND, pull_back(head)) for head in heads])
    d_beta_ref[...] = functools.reduce(jnp.add, columns).T[: plan.heads]


def _pull_back(q, k, w, state, inverse, lower, attend, d_o, d_state, factors, sums, head):
    """dQ, dK, dV, dg and dS, all float32."""
    dtype, chunk = q.dtype, q.shape[0]
    read, write = factors.read(sums), factors.write(sums, head)
    yield
    k_written, narrow = (k * write).astype(dtype), d_state.astype(dtype)
    right = jnp.concatenate([d_o, narrow])
    rhs = dot(jnp.concatenate([attend.T, k_written], 1), right)
    yield
    d_r_wide = yield from head_backward.solve_transposed(lower.T, inverse, rhs)
    d_r = d_r_wide.astype(dtype)
    outer = dot_transposed(jnp.concatenate([d_r, d_o]), jnp.concatenate([w, state]))
    yield
    weights = factors.weights(head)
    d_lower = outer[:chunk, :chunk] * -weights
    d_attend = outer[chunk:, :chunk] * weights
    d_alone = jnp.where(factors.is_diagonal, d_attend, 0).astype(dtype)
    d_k_reader, d_q = -outer[:chunk, chunk:] * read, outer[chunk:, chunk:] * read
    d_k_write = dot_transposed(w, narrow) * write
    yield
    (d_q, d_k_reader), d_k_writer = yield from factors.pull_back_pairs(
        (q, k), k, (d_attend, d_lower), (d_q, d_k_reader), sums
    )
    d_gates = q * d_q + k * (d_k_reader - d_k_writer)
    carry = factors.carry(sums)
    carried = carry * jnp.sum((state * d_state).T, axis=0, keepdims=True)
    d_g = tpu_channel_gates.sum_gates(d_gates, k * d_k_write, dtype) + carried
    yield
    d_q += dot(d_alone, k)
    d_k = d_k_reader + d_k_writer + d_k_write + dot(d_alone, q)
    k_read, q_read = ((x * read).astype(dtype).T for x in (k, q))
    leaving = jnp.concatenate([q_read, -k_read], 1)
    d_state = factors.carry_column(sums) * d_state + dot(leaving, jnp.concatenate([d_o, d_r]))
    yield
    return d_q, d_k, d_r_wide, d_g, d_state
