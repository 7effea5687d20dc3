"""The parallel part of the gradient where a head has one decay, or none: a GPU kernel.

Notation as in `backward`.
"""

import jax.numpy as jnp

from effarch.kernels.delta_rule.pallas_gpu import blocks, rows
from effarch.kernels.delta_rule.pallas_gpu.blocks import Blocks, dot
from effarch.kernels.delta_rule.pallas_gpu.forward import head_factors
from effarch.kernels.delta_rule.pallas_gpu.rows import Factors, Plan

_WARPS = 8


def gather(q, k, v, f: Factors, done: dict, d_o, d_states, plan: Plan) -> tuple:
    """Gradients of q and k [B,T,HV,K], v and g (None without); `done` as `forward` says."""
    b = Blocks(plan)
    batch, length = v.shape[:2]
    chunks, heads = length // plan.chunk, plan.value_heads
    keys, key, value = b.keys(plan.key), b.values(plan.key), b.values(plan.value)
    state = b.tile(plan.key, plan.value)
    inputs = dict(
        q=(q, keys),
        k=(k, keys),
        v=(v, value),
        d_o=(d_o, value),
        states=(done["states"], state),
        d_states=(d_states, state),
        **head_factors(f, b, plan, "read", "write"),
    )
    dtype = q.dtype if plan.group == 1 else jnp.float32
    tokens = ((batch, length, heads, plan.key), dtype, key)
    outputs = dict(d_q=tokens, d_k=tokens, d_v=(v.shape, v.dtype, value))
    if plan.gate == "head":
        numbers = ((batch, heads, length), jnp.float32, b.per_token())
        outputs |= dict(d_log=numbers, d_write_log=numbers)
        outputs["d_carry"] = ((batch, heads, chunks, 1, plan.key), jnp.float32, b.tile(1, plan.key))
    found = blocks.call(
        *(_kernel, plan, (chunks, batch * heads), inputs, outputs),
        name="linear_attention_gather",
        warps=_WARPS,
    )
    d_g = None
    if plan.gate == "head":
        d_carry = jnp.sum(found["d_carry"][:, :, :, 0], axis=-1, keepdims=True)
        d_g = rows.gate_gradient(found["d_log"], found["d_write_log"], f.carry * d_carry, plan)
    return found["d_q"], found["d_k"], found["d_v"], d_g


def _kernel(
    plan, *, q, k, v, d_o, states, d_states, read, write, d_q, d_k, d_v,
    coarse=None, fine=None, docs=None, d_log=None, d_write_log=None, d_carry=None,
):  # fmt: skip
    dtype, writing = q.dtype, write[...][:, None]
    decay = blocks.pairs(plan, coarse, fine, docs, strict=False)
    products = dot(q[...], k[...].T)
    attend = (plan.scale * products * decay).astype(dtype)
    d_values = dot(attend.T, d_o[...]) + writing * dot(k[...], d_states[...])
    d_v[...] = d_values.astype(d_v.dtype)
    d_products = plan.scale * decay * dot(d_o[...], v[...].T)
    if plan.gate == "head":
        # The diagonal has no decay: leaving it out keeps tiny gradients of strong decays exact.
        row, column = blocks.positions(plan.chunk)
        moved = jnp.where(row > column, d_products * products, 0.0)
        logs = jnp.sum(moved, axis=1) - jnp.sum(moved, axis=0)
        d_carry[0, :] = _sum_products(states, d_states)
    met = d_products.astype(dtype)
    d_read = (plan.scale * read[...])[:, None] * dot(d_o[...], states[...].T)
    d_q[...] = (dot(met, k[...]) + d_read).astype(d_q.dtype)
    if plan.gate == "head":
        d_log[...] = logs + jnp.sum(d_read * q[...], axis=1)
    d_write = writing * dot(v[...], d_states[...].T)
    d_k[...] = (dot(met.T, q[...]) + d_write).astype(d_k.dtype)
    if plan.gate == "head":
        d_write_log[...] = jnp.sum(d_write * k[...], axis=1)


def _sum_products(x, y):
    """Of two refs [K,V], summed over V: [K]."""
    total = 0.0
    for own in blocks.columns(x, 16):
        total += jnp.sum(x[:, own].astype(jnp.float32) * y[:, own], axis=1)
    return total
