"""The gradient of the gated delta rule: GPU kernels, one of them from the last chunk to the first.

Forward of a chunk (`forward`), with A = (I + L)^-1 and B = beta (V - (read K) S):

    V' = A B       O = scale ((read Q) S + P V')       S' = carry S + K^T (write V')

    local    (parallel)     scale P^T dO, what O says of V'
    retreat  (in sequence)  dV' = local + write (K dS')
                            dS  = carry dS' + scale (read Q)^T dO - W^T dV'
    gather   (parallel)     dB = A^T dV'     dL = -strict_lower(dB V'^T)     dP = scale lower(dO V'^T)

and from these the gradients of the inputs (`head_gather`, `channel_gather`). What flows to the logarithm
of a factor is the factor times its gradient; `rows.gate_gradient` sums that over time.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from effarch.kernels.delta_rule.pallas_gpu import (
    blocks,
    channel_gather,
    channel_pairs,
    forward,
    head_gather,
)
from effarch.kernels.delta_rule.pallas_gpu.blocks import Blocks, Whole, dot
from effarch.kernels.delta_rule.pallas_gpu.rows import Factors, Plan


def backward(q, k, v, beta, f: Factors, done: dict, d_o, d_final, plan: Plan) -> tuple:
    """Gradients of q, k, v, beta, g (None without) and the initial state; `done` as `forward` says."""
    keys = {}
    if plan.per_channel:
        rows_q, rows_k = (channel_pairs.by_value_head(x, plan) for x in (q, k))
        factors = dict(q_read=rows_q * f.read, k_read=rows_k * f.read, k_write=rows_k * f.write)
        keys = {name: x.astype(q.dtype) for name, x in factors.items()}
    local = _local(q, k, f, done, d_o, plan)
    d_states, d_new, d_initial = _retreat(q, k, f, keys, done, d_o, local, d_final, plan)
    gather = channel_gather if plan.per_channel else head_gather
    given = (keys,) if plan.per_channel else ()
    d_q, d_k, d_v, d_beta, d_g = gather.gather(
        *(q, k, v, beta, f, *given, done, d_o, d_states, d_new, plan)
    )
    d_q, d_k = (_by_key_head(x, plan).astype(q.dtype) for x in (d_q, d_k))
    return d_q, d_k, d_v, d_beta, d_g, d_initial


def _by_key_head(x, plan):
    """[B,T,HV,K] -> [B,T,H,K], the sum over the value heads of a key head."""
    if plan.group == 1:
        return x
    return jnp.sum(x.reshape(*x.shape[:2], -1, plan.group, x.shape[3]), axis=3)


def _local(q, k, f, done, d_o, plan):
    b = Blocks(plan, plan.value)
    inputs = dict(
        q=(None if plan.per_channel else q, b.keys(plan.key)),
        k=(None if plan.per_channel else k, b.keys(plan.key)),
        attend=(done.get("attend"), b.tile(plan.chunk, plan.chunk)),
        d_o=(d_o, b.value_columns()),
        **forward.head_factors(f, b, plan),
    )
    outputs = dict(local=(d_o.shape, q.dtype, b.value_columns()))
    grid = (1, d_o.shape[1] // plan.chunk, d_o.shape[0] * plan.value_heads)
    return blocks.call(_local_kernel, plan, grid, inputs, outputs, name="delta_rule_local")["local"]


def _local_kernel(
    plan, *, d_o, local, q=None, k=None, coarse=None, fine=None, docs=None, attend=None
):
    if plan.per_channel:
        weights = attend[...]
    else:
        weights = dot(q[...], k[...].T) * blocks.pairs(plan, coarse, fine, docs, strict=False)
    total = dot(weights.astype(local.dtype).T, d_o[...])
    local[...] = (plan.scale * total).astype(local.dtype)


def _retreat(q, k, f, keys, done, d_o, local, d_final, plan):
    """dS' of every chunk [B,HV,N,K,V], dV' [B,T,HV,V] in the dtype of q, and d initial."""
    r = Whole(plan, local.shape[1])
    inputs = dict(
        q=(keys.get("q_read", q), r.keys()),
        k=(keys.get("k_write", k), r.keys()),
        w=(done["w"], r.values(plan.key)),
        read=(None if plan.per_channel else f.read, r.per_token()),
        write=(None if plan.per_channel else f.write, r.per_token()),
        carry=(f.carry, r.carry(f.carry.shape[-1])),
        d_o=(d_o, r.value_columns()),
        local=(local, r.value_columns()),
        d_final=(d_final, r.state_columns()),
    )
    outputs = dict(
        d_states=(done["states"].shape, q.dtype, r.all_states_columns()),
        d_new=(local.shape, q.dtype, r.value_columns()),
        d_initial=(d_final.shape, jnp.float32, r.state_columns()),
    )
    found = blocks.call(
        *(_retreat_kernel, plan, r.grid(local.shape[0]), inputs, outputs),
        name="delta_rule_retreat",
        stages=2,
    )
    return found["d_states"], found["d_new"], found["d_initial"]


def _retreat_kernel(
    plan, *, q, k, w, carry, d_o, local, d_final, d_states, d_new, d_initial, read=None, write=None
):
    chunks = carry.shape[0]

    def step(i, d_state):
        n = chunks - 1 - i
        own = pl.ds(n * plan.chunk, plan.chunk)
        leaving = d_state.astype(k.dtype)
        d_states[n] = leaving
        written, seen = dot(k[own, :], leaving), d_o[own, :]
        if not plan.per_channel:
            written *= write[own][:, None]
            seen = (seen * read[own][:, None]).astype(q.dtype)
        d_values = (local[own, :] + written).astype(d_new.dtype)
        d_new[own, :] = d_values
        kept = carry[n, :][:, None] if plan.per_channel else carry[n, 0]
        entering = kept * d_state + plan.scale * dot(q[own, :].T, seen)
        return entering - dot(w[own, :].T, d_values)

    d_initial[...] = jax.lax.fori_loop(0, chunks, step, d_final[...])
