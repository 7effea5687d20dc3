"""Linear attention forward: two GPU kernels, and one more for decays per channel.

For one head and chunk, with the decays as factors (`rows.Factors`), S the state that enters:

    advance  (in sequence)  S <- carry S + K^T (write V)
    attend   (parallel)     O = scale ((read Q) S + P V)      P = lower(Q K^T pairs)

With decays per channel `read Q` and `write K` come ready, and so does P (`channel_pairs`). Products
take bfloat16 operands and sum in float32.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from effarch.kernels.delta_rule.pallas_gpu import blocks
from effarch.kernels.delta_rule.pallas_gpu.blocks import Blocks, Whole, dot
from effarch.kernels.delta_rule.pallas_gpu.forward import head_factors
from effarch.kernels.delta_rule.pallas_gpu.rows import Factors, Plan
from effarch.kernels.linear_attention.pallas_gpu import channel_pairs


def forward(q, k, v, f: Factors, initial, plan: Plan) -> dict[str, jax.Array]:
    """o [B,T,HV,V], final [B,HV,K,V], and what the gradient needs.

    That is, in the dtype of q: the states that enter the chunks [B,HV,N,K,V] and, for decays per
    channel, attend (P) [B,HV,N,C,C].
    """
    keys, kept = {}, {}
    if plan.per_channel:
        keys = channel_pairs.decayed(q, k, f, plan)
        kept = dict(attend=channel_pairs.products(q, k, f, plan))
    states, final = _advance(keys.get("k_write", k), v, f, initial, plan)
    o = _attend(q, k, v, f, keys | kept, states, plan)
    return dict(o=o, final=final, states=states, **kept)


def _advance(k, v, f, initial, plan):
    batch, length = v.shape[:2]
    r = Whole(plan, length)
    inputs = dict(
        k=(k, r.keys()),
        v=(v, r.value_columns()),
        write=(None if plan.per_channel else f.write, r.per_token()),
        carry=(f.carry, r.carry(f.carry.shape[-1])),
        initial=(initial, r.state_columns()),
    )
    shape = (batch, plan.value_heads, length // plan.chunk, plan.key, plan.value)
    outputs = dict(
        states=(shape, k.dtype, r.all_states_columns()),
        final=(initial.shape, jnp.float32, r.state_columns()),
    )
    done = blocks.call(
        *(_advance_kernel, plan, r.grid(batch), inputs, outputs),
        name="linear_attention_advance",
        stages=2,
    )
    return done["states"], done["final"]


def _advance_kernel(plan, *, k, v, carry, initial, states, final, write=None):
    def step(n, state):
        own = pl.ds(n * plan.chunk, plan.chunk)
        states[n] = state.astype(states.dtype)
        values = v[own, :]
        if not plan.per_channel:
            values = (write[own][:, None] * values).astype(k.dtype)
        kept = carry[n, :][:, None] if plan.per_channel else carry[n, 0]
        return kept * state + dot(k[own, :].T, values)

    final[...] = jax.lax.fori_loop(0, carry.shape[0], step, initial[...])


def _attend(q, k, v, f, keys, states, plan):
    b = Blocks(plan)
    batch, length = v.shape[:2]
    values = b.values(plan.value)
    inputs = dict(
        q=(keys["q_read"], b.values(plan.key)) if keys else (q, b.keys(plan.key)),
        k=(None if keys else k, b.keys(plan.key)),
        attend=(keys.get("attend"), b.tile(plan.chunk, plan.chunk)),
        v=(v, values),
        states=(states, b.tile(plan.key, plan.value)),
        **head_factors(f, b, plan, "read"),
    )
    outputs = dict(o=(v.shape, v.dtype, values))
    grid = (length // plan.chunk, batch * plan.value_heads)
    name = "linear_attention_attend"
    return blocks.call(_attend_kernel, plan, grid, inputs, outputs, name=name)["o"]


def _attend_kernel(
    plan,
    *,
    q,
    v,
    states,
    o,
    k=None,
    read=None,
    coarse=None,
    fine=None,
    docs=None,
    attend=None,
):
    if plan.per_channel:
        total = plan.scale * (dot(q[...], states[...]) + dot(attend[...], v[...]))
    else:
        row, tile = blocks.pairs_by_row(plan, coarse, fine, docs, strict=False)
        weights = ((plan.scale * row)[:, None] * (dot(q[...], k[...].T) * tile)).astype(v.dtype)
        seen = (plan.scale * read[...])[:, None] * dot(q[...], states[...])
        total = seen + dot(weights, v[...])
    o[...] = total.astype(o.dtype)
