"""The gradient of the gated delta rule: one Pallas TPU kernel, from the last chunk to the first.

Forward of a chunk, with the factors of `tpu_head_gates` and what was saved (S, w, inverted blocks X):

    (I + L) w = V - (read K) S       L = strict_lower(K K^T pairs)
    O = scale ((read Q) S + P w)     P = (Q K^T) pairs
    S' = carry S + (write K)^T w

Backward, from dO' = scale dO and the gradient dS' of the leaving state:

    (I + L)^T dr = P^T dO' + (write K) dS'            by blocks, last to first; dV = dr
    dL = -strict_lower(dr w^T)                        dP = lower(dO' w^T)
    dQ = (dP pairs) K + read (dO' S^T)
    dK = (dL pairs + (dL pairs)^T) K + (dP pairs)^T Q - read (dr S^T) + write (w dS'^T)
    dS = carry dS' + (read Q)^T dO' - (read K)^T dr

What flows to the logarithm of a factor is the factor times its gradient. `pairs` and `read` end at
token i, `write` starts at token j, and `pairs` starts at j too, so with E = dL L + strict_lower(dP P):

    d G_i = rows_i(E + dQ_read Q + dK_read K) - columns_i(E)     to all gates up to token i
    write_j = rows_j(dK_write K)                                 to all gates after token j
    carry <S, dS'>                                               to all gates

and beta d beta = rows(w dr), since beta scales the columns of L, P and write K, and w is V' / beta.
Legend as in `forward`.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from effarch.kernels.chunked import tpu_blocks, tpu_head_gates, tpu_heads, tpu_rows
from effarch.kernels.chunked.tpu_heads import dot, dot_transposed, lanes_of
from effarch.kernels.delta_rule.pallas_tpu import forward

_HEADS_A_ROUND = 1  # so many join in each round: measured best of 1, 2, 4, 8 and 16


def backward(q, k, beta, g, marks, states, w, inverse, d_o, d_final, plan: tpu_rows.Plan):
    """Gradients of q, k [B,T,H*K], v [B,T,HV*V], beta (times beta), g [B,N,J,HB,C] and initial.

    Arguments as those and the results of `forward`.
    """
    batch, chunks, groups = beta.shape[:3]
    heads, chunk, key, value = plan.heads, plan.chunk, plan.key, plan.value

    def at(n):
        return chunks - 1 - n

    keys = tpu_blocks.tokens(plan, heads // plan.group * key, at)
    values = tpu_blocks.tokens(plan, heads * value, at)
    per_token = tpu_blocks.per_token(plan, heads, at)
    inputs = [
        *((keys, q), (keys, k), (per_token, beta), (tpu_blocks.sums(plan, g, at), g)),
        (tpu_blocks.marks(plan, at), marks),
        (tpu_blocks.per_head(plan, key, value, at), states),
        (values, w),
        (tpu_blocks.per_head(plan, forward.BLOCK, chunk, at), inverse),
        *((values, d_o), (tpu_blocks.whole(), d_final)),
    ]
    lanes = tpu_rows.LANES
    log_columns = (batch, chunks, groups, lanes, chunk)
    outputs = [
        *((keys, q.shape, q.dtype), (keys, k.shape, k.dtype), (values, w.shape, w.dtype)),
        (per_token, beta.shape, jnp.float32),
        (tpu_blocks.per_token(plan, lanes, at), log_columns, jnp.float32),
        (tpu_blocks.state(plan), d_final.shape, jnp.float32),
    ]
    d_q, d_k, d_v, log_rows, log_columns, d_initial = tpu_blocks.call(
        *(_kernel, plan, (batch, groups, chunks), inputs, outputs),
        flops=10 * chunk * (key + value) + 12 * key * value,
        name="delta_rule_backward",
    )
    d_g, beta_d_beta = tpu_head_gates.gradients(log_rows, log_columns, 3, plan)
    return d_q, d_k, d_v, beta_d_beta, d_g, d_initial


def _kernel(plan, *refs):
    q_ref, k_ref, beta_ref, g_ref, marks_ref, states_ref, w_ref, inverse_ref = refs[:8]
    d_o_ref, d_final_ref, d_q_ref, d_k_ref, d_v_ref, *logs, d_state_ref = refs[8:]
    log_rows_ref, log_columns_ref = logs
    row, group, step = (pl.program_id(x) for x in range(3))
    heads = range(plan.heads)

    @pl.when(step == 0)
    def _():
        tpu_blocks.load_state(plan, d_final_ref, d_state_ref, row, group)

    factors = tpu_head_gates.HeadGates(g_ref[...], beta_ref[...], marks_ref[...], plan)
    shared = tpu_heads.SharedKeys(plan, d_q_ref, d_k_ref)
    columns = []

    def pull_back(head):
        own, own_keys = lanes_of(head, plan.value), lanes_of(head // plan.group, plan.key)
        d_q, d_k, d_v, log_row, log_columns, d_state = yield from _pull_back(
            *(q_ref[:, own_keys], k_ref[:, own_keys], w_ref[:, own], states_ref[head]),
            *(inverse_ref[head], d_o_ref[:, own], d_state_ref[0, head], factors, head, plan),
        )
        d_v_ref[:, own] = d_v.astype(d_v_ref.dtype)
        d_state_ref[0, head] = d_state
        log_rows_ref[head : head + 1] = log_row
        columns.append(log_columns)
        shared.add(head, d_q, d_k)

    tpu_heads.interleave([(head // _HEADS_A_ROUND, pull_back(head)) for head in heads])
    log_columns_ref[...] = functools.reduce(jnp.add, columns).T


def _pull_back(q, k, w, state, inverse, d_o, d_state, factors, head, plan):
    """dQ, dK, dV, what flows to the logarithms of factors (a row, and columns in lanes), and dS."""
    dtype, (chunk, width) = q.dtype, q.shape
    products = dot_transposed(jnp.concatenate([k, q]), k)
    yield
    pairs, read = factors.pairs_and_read(head)
    read, write = read[:, :width], factors.write_column(head)[:, :width]
    lower, attend = ((x * pairs).astype(dtype).T for x in (products[:chunk], products[chunk:]))
    yield
    k_written = (k * write).astype(dtype)
    d_o, d_state_narrow = (d_o * plan.scale).astype(dtype), d_state.astype(dtype)
    right = jnp.concatenate([d_o, d_state_narrow])
    rhs = dot(jnp.concatenate([attend, k_written], 1), right)
    yield
    d_r_wide = yield from solve_transposed(lower, inverse, rhs)
    d_r = d_r_wide.astype(dtype)

    outer = dot_transposed(jnp.concatenate([d_r, d_o]), jnp.concatenate([w, state]))
    yield
    row, column = (jax.lax.broadcasted_iota(jnp.int32, (chunk, chunk), x) for x in (0, 1))
    is_below = row > column
    d_lower = -jnp.where(is_below, outer[:chunk, :chunk] * pairs, 0)
    d_attend = outer[chunk:, :chunk] * pairs
    d_k_read, d_q_read = -outer[:chunk, chunk:] * read, outer[chunk:, chunk:] * read
    d_k_write = dot_transposed(w, d_state_narrow) * write
    yield
    d_q = d_q_read + dot(d_attend.astype(dtype), k)
    narrow_lower = d_lower.astype(dtype)  # adding its transpose rounds nothing: one of them is 0
    both = [narrow_lower + narrow_lower.T, d_attend.astype(dtype).T]
    d_k = d_k_read + d_k_write + dot(jnp.concatenate(both, 1), jnp.concatenate([k, q]))
    yield
    log_row, log_columns = yield from factors.log_gradients(
        head,
        d_lower * products[:chunk] + d_attend * products[chunk:],
        d_q_read * q + d_k_read * k,
        *(d_k_write * k, (w * d_r_wide,), state, d_state, dtype),
    )
    k_read, q_read = ((x * read).astype(dtype).T for x in (k, q))
    d_state = factors.carry(head) * d_state + dot(
        jnp.concatenate([q_read, -k_read], 1), jnp.concatenate([d_o, d_r])
    )
    return d_q, d_k, d_r_wide, log_row, log_columns, d_state


def solve_transposed(lower, inverse, rhs):
    """(I + L)^-T rhs in float32, from L^T and the inverted diagonal blocks of I + L."""
    dtype, inverse = lower.dtype, inverse.T
    solved, narrow = [], []
    for start in reversed(range(0, rhs.shape[0], forward.BLOCK)):
        own, behind = slice(start, start + forward.BLOCK), start + forward.BLOCK
        left = rhs[own]
        if narrow:
            left -= dot(lower[own, behind:], jnp.concatenate(narrow))
            yield
        solved.insert(0, dot(inverse[own], left.astype(dtype)))
        narrow.insert(0, solved[0].astype(dtype))
        yield
    return jnp.concatenate(solved)
