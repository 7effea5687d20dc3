"""The gradient of linear attention: GPU kernels, one of them from the last chunk to the first.

Of a chunk with the factors of the gates and the saved entering state S, from dO' = scale dO and the
gradient dS' of the leaving state:

    retreat  (in sequence)  dS = carry dS' + (read Q)^T dO'
    gather   (parallel)     dV = P^T dO' + (write K) dS'           dP = lower(dO' V^T)
                            dQ = (dP pairs) K + read (dO' S^T)
                            dK = (dP pairs)^T Q + write (V dS'^T)

Gates: what flows to the logarithm of a factor is the factor times its gradient; `rows.gate_gradient`
sums that over time.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from effarch.kernels.delta_rule.pallas_gpu import blocks
from effarch.kernels.delta_rule.pallas_gpu.blocks import Whole, dot
from effarch.kernels.delta_rule.pallas_gpu.rows import Factors, Plan
from effarch.kernels.linear_attention.pallas_gpu import channel_gather, channel_pairs, head_gather


def backward(q, k, v, f: Factors, done: dict, d_o, d_final, plan: Plan) -> tuple:
    """Gradients of q, k, v, g (None without) and the initial state; `done` as `forward` says."""
    keys = channel_pairs.decayed(q, k, f, plan) if plan.per_channel else {}
    d_states, d_initial = _retreat(keys.get("q_read", q), f, d_o, d_final, plan)
    if plan.per_channel:
        d_q, d_k, d_v, d_g = channel_gather.gather(q, k, v, f, keys, done, d_o, d_states, plan)
    else:
        d_q, d_k, d_v, d_g = head_gather.gather(q, k, v, f, done, d_o, d_states, plan)
    d_q, d_k = (_by_key_head(x, plan).astype(q.dtype) for x in (d_q, d_k))
    return d_q, d_k, d_v, d_g, d_initial


def _by_key_head(x, plan):
    """[B,T,HV,K] -> [B,T,H,K], the sum over the value heads of a key head."""
    if plan.group == 1:
        return x
    return jnp.sum(x.reshape(*x.shape[:2], -1, plan.group, x.shape[3]), axis=3)


def _retreat(q, f, d_o, d_final, plan):
    """dS' of every chunk [B,HV,N,K,V] in the dtype of q, and d initial."""
    batch, length = d_o.shape[:2]
    r = Whole(plan, length)
    inputs = dict(
        q=(q, r.keys()),
        read=(None if plan.per_channel else f.read, r.per_token()),
        carry=(f.carry, r.carry(f.carry.shape[-1])),
        d_o=(d_o, r.value_columns()),
        d_final=(d_final, r.state_columns()),
    )
    shape = (batch, plan.value_heads, length // plan.chunk, plan.key, plan.value)
    outputs = dict(
        d_states=(shape, q.dtype, r.all_states_columns()),
        d_initial=(d_final.shape, jnp.float32, r.state_columns()),
    )
    found = blocks.call(
        *(_retreat_kernel, plan, r.grid(batch), inputs, outputs),
        name="linear_attention_retreat",
        stages=2,
    )
    return found["d_states"], found["d_initial"]


def _retreat_kernel(plan, *, q, carry, d_o, d_final, d_states, d_initial, read=None):
    chunks = carry.shape[0]

    def step(i, d_state):
        n = chunks - 1 - i
        own = pl.ds(n * plan.chunk, plan.chunk)
        d_states[n] = d_state.astype(d_states.dtype)
        seen = d_o[own, :]
        if not plan.per_channel:
            seen = (read[own][:, None] * seen).astype(q.dtype)
        kept = carry[n, :][:, None] if plan.per_channel else carry[n, 0]
        return kept * d_state + plan.scale * dot(q[own, :].T, seen)

    d_initial[...] = jax.lax.fori_loop(0, chunks, step, d_final[...])
