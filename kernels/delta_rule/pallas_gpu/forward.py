"""The gated delta rule forward: three GPU kernels.

For one head and chunk, with the decays as factors (`rows.Factors`), S the state that enters:

    prepare  (parallel)     (I + L) [W | U] = beta [read K | V]     L = strict_lower(beta K K^T pairs)
    advance  (in sequence)  V' = U - W S        S <- carry S + K^T (write V')
    attend   (parallel)     O = scale ((read Q) S + P V')           P = lower(Q K^T pairs)

With decays per channel `read Q`, `read K` and `write K` come ready, and so do P and L / beta
(`channel_pairs`). Products take bfloat16 operands and sum in float32.
Legend: N chunks of C tokens, BV columns of the state that a program carries.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from effarch.kernels.delta_rule.pallas_gpu import blocks, channel_pairs, solve
from effarch.kernels.delta_rule.pallas_gpu.blocks import Blocks, Whole, dot
from effarch.kernels.delta_rule.pallas_gpu.rows import Factors, Plan


def forward(q, k, v, beta, f: Factors, initial, plan: Plan) -> dict[str, jax.Array]:
    """o [B,T,HV,V], final [B,HV,K,V], and what the gradient needs.

    That is, in the dtype of q: the states that enter the chunks [B,HV,N,K,V], w [B,T,HV,K], new (V')
    [B,T,HV,V], inverse (X of `solve`, blocks side by side) [B,HV,N,16,C]; and for decays per channel
    key_products (L / beta, float32) and attend (P) [B,HV,N,C,C].
    """
    keys = channel_pairs.decayed(q, k, f, plan) if plan.per_channel else {}
    w, u, inverse = _prepare(k, v, beta, f, keys, plan)
    states, new, final = _advance(w, u, keys.get("k_write", k), f, initial, plan)
    o = _attend(q, k, f, keys, states, new, plan)
    kept = {name: keys[name] for name in ("key_products", "attend") if name in keys}
    return dict(o=o, final=final, states=states, w=w, new=new, inverse=inverse, **kept)


def _prepare(k, v, beta, f, keys, plan):
    b, chunk = Blocks(plan), plan.chunk
    batch, length = v.shape[:2]
    chunks = length // chunk
    key, value = b.values(plan.key), b.values(plan.value)
    inputs = dict(
        k=(None, None) if keys else (k, b.keys(plan.key)),
        k_read=(keys.get("k_read"), key),
        key_products=(keys.get("key_products"), b.tile(chunk, chunk)),
        v=(v, value),
        beta=(beta, b.per_token()),
        **head_factors(f, b, plan, "read"),
    )
    tiles = (batch, plan.value_heads, chunks)
    outputs = dict(
        w=((batch, length, plan.value_heads, plan.key), k.dtype, key),
        u=(v.shape, k.dtype, value),
        inverse=((*tiles, solve.BLOCK, chunk), k.dtype, b.tile(solve.BLOCK, chunk)),
        scratch=((*tiles, chunk, solve.BLOCK), jnp.float32, b.tile(chunk, solve.BLOCK)),
    )
    grid = (chunks, batch * plan.value_heads)
    done = blocks.call(
        _prepare_kernel, plan, grid, inputs, outputs, name="delta_rule_prepare", warps=4
    )
    return done["w"], done["u"], done["inverse"]


def _prepare_kernel(
    plan,
    *,
    v,
    beta,
    w,
    u,
    inverse,
    scratch,
    k=None,
    read=None,
    coarse=None,
    fine=None,
    docs=None,
    k_read=None,
    key_products=None,
):
    strength = beta[...]
    if plan.per_channel:
        lower = strength[:, None] * key_products[...]
    else:
        row, tile = blocks.pairs_by_row(plan, coarse, fine, docs, strict=True)
        lower = (strength * row)[:, None] * (dot(k[...], k[...].T) * tile)
    solve.invert_diagonal_blocks(plan, lower, scratch, inverse)
    operators = solve.operators(plan, lower, inverse)
    reading, keys = (strength, k_read) if plan.per_channel else (strength * read[...], k)
    for factor, source, result in ((reading, keys, w), (strength, v, u)):
        for own in blocks.columns(source, plan.columns):
            right = factor[:, None] * source[:, own]
            result[:, own] = solve.solve(*operators, right).astype(result.dtype)


def _advance(w, u, k, f, initial, plan):
    batch, length = u.shape[:2]
    chunks, heads = length // plan.chunk, plan.value_heads
    r = Whole(plan, length)
    inputs = dict(
        w=(w, r.values(plan.key)),
        u=(u, r.value_columns()),
        k=(k, r.keys()),
        write=(None if plan.per_channel else f.write, r.per_token()),
        carry=(f.carry, r.carry(f.carry.shape[-1])),
        initial=(initial, r.state_columns()),
    )
    states = (batch, heads, chunks, plan.key, plan.value)
    outputs = dict(
        states=(states, w.dtype, r.all_states_columns()),
        new=(u.shape, w.dtype, r.value_columns()),
        final=(initial.shape, jnp.float32, r.state_columns()),
    )
    done = blocks.call(
        *(_advance_kernel, plan, r.grid(batch), inputs, outputs),
        name="delta_rule_advance",
        stages=2,
    )
    return done["states"], done["new"], done["final"]


def _advance_kernel(plan, *, w, u, k, carry, initial, states, new, final, write=None):
    def step(n, state):
        own = pl.ds(n * plan.chunk, plan.chunk)
        entering = state.astype(w.dtype)
        states[n] = entering
        values = u[own, :] - dot(w[own, :], entering)
        new[own, :] = values.astype(new.dtype)
        written = values if write is None else write[own][:, None] * values
        kept = carry[n, :][:, None] if plan.per_channel else carry[n, 0]
        return kept * state + dot(k[own, :].T, written.astype(k.dtype))

    final[...] = jax.lax.fori_loop(0, carry.shape[0], step, initial[...])


def _attend(q, k, f, keys, states, new, plan):
    b = Blocks(plan, plan.value)
    batch, length = new.shape[:2]
    chunk = plan.chunk
    inputs = dict(
        q=(keys["q_read"], b.values(plan.key)) if keys else (q, b.keys(plan.key)),
        k=(None, None) if keys else (k, b.keys(plan.key)),
        attend=(keys.get("attend"), b.tile(chunk, chunk)),
        states=(states, b.tile_columns(plan.key)),
        new=(new, b.value_columns()),
        **head_factors(f, b, plan, "read"),
    )
    outputs = dict(o=(new.shape, new.dtype, b.value_columns()))
    grid = (1, length // chunk, batch * plan.value_heads)
    return blocks.call(_attend_kernel, plan, grid, inputs, outputs, name="delta_rule_attend")["o"]


def _attend_kernel(
    plan,
    *,
    q,
    states,
    new,
    o,
    k=None,
    read=None,
    coarse=None,
    fine=None,
    docs=None,
    attend=None,
):
    if plan.per_channel:
        total = plan.scale * (dot(q[...], states[...]) + dot(attend[...], new[...]))
    else:
        row, tile = blocks.pairs_by_row(plan, coarse, fine, docs, strict=False)
        weights = ((plan.scale * row)[:, None] * (dot(q[...], k[...].T) * tile)).astype(new.dtype)
        seen = (plan.scale * read[...])[:, None] * dot(q[...], states[...])
        total = seen + dot(weights, new[...])
    o[...] = total.astype(o.dtype)


def head_factors(f: Factors, b: Blocks, plan: Plan, *names) -> dict:
    """Inputs of a kernel that makes pairs itself; nothing for decays per channel."""
    if plan.per_channel:
        return {}
    found = {name: (getattr(f, name), b.per_token()) for name in ("coarse", "fine", *names)}
    return found | dict(docs=(f.docs, b.documents()))
