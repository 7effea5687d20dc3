"""The parallel part of the gradient where a head has one decay, or none: two GPU kernels.

Notation as in `backward`, A = (I + L)^-1, L = beta strict_lower(K K^T pairs), P = lower(Q K^T pairs):

    gather   dB = A^T dV'       dL = -strict_lower(dB V'^T)      dP = scale lower(dO V'^T)
             dV = beta dB       E  = symmetric(beta pairs dL)    F  = pairs dP
    finish   dQ = F K + scale read dO S^T
             dK = F^T Q + E K - beta read dB S^T + write V' dS'^T

One kernel for both would not fit into the registers.
"""

import functools

import jax.numpy as jnp

from effarch.kernels.delta_rule.pallas_gpu import blocks, forward, rows, solve
from effarch.kernels.delta_rule.pallas_gpu.blocks import Blocks, dot
from effarch.kernels.delta_rule.pallas_gpu.rows import Factors, Plan

_WARPS = 8


def gather(q, k, v, beta, f: Factors, done: dict, d_o, d_states, d_new, plan: Plan) -> tuple:
    """Gradients of q and k [B,T,HV,K], v, beta and g (None without); `done` as `forward` says."""
    b = Blocks(plan)
    batch, length = v.shape[:2]
    chunks, heads, chunk = length // plan.chunk, plan.value_heads, plan.chunk
    keys, key, value = b.keys(plan.key), b.values(plan.key), b.values(plan.value)
    tile, state, per_token = b.tile(chunk, chunk), b.tile(plan.key, plan.value), b.per_token()
    numbers = ((batch, heads, length), jnp.float32, per_token)
    pairs = ((batch, heads, chunks, chunk, chunk), q.dtype, tile)
    call = functools.partial(blocks.call, warps=_WARPS)
    shared = dict(q=(q, keys), k=(k, keys), new=(done["new"], value), d_o=(d_o, value))
    inputs = shared | dict(
        v=(v, value),
        beta=(beta, per_token),
        inverse=(done["inverse"], b.tile(solve.BLOCK, chunk)),
        d_new=(d_new, value),
        **forward.head_factors(f, b, plan),
    )
    outputs = dict(d_v=(v.shape, v.dtype, value), d_b=(v.shape, q.dtype, value))
    outputs |= dict(d_beta=numbers, to_q=pairs, to_k=pairs)
    if plan.gate == "head":
        outputs["d_log"] = numbers
    grid = (chunks, batch * heads)
    found = call(_gather_kernel, plan, grid, inputs, outputs, name="delta_rule_gather")

    inputs = shared | dict(
        states=(done["states"], state),
        d_states=(d_states, state),
        d_b=(found["d_b"], value),
        to_q=(found["to_q"], tile),
        to_k=(found["to_k"], tile),
        **{name: (x, per_token) for name, x in dict(beta=beta, read=f.read, write=f.write).items()},
    )
    dtype = q.dtype if plan.group == 1 else jnp.float32
    tokens = ((batch, length, heads, plan.key), dtype, key)
    outputs = dict(d_q=tokens, d_k=tokens, d_beta=numbers)
    if plan.gate == "head":
        outputs |= dict(d_log=numbers, d_write_log=numbers)
        outputs["d_carry"] = ((batch, heads, chunks, 1, plan.key), jnp.float32, b.tile(1, plan.key))
    last = call(_finish_kernel, plan, grid, inputs, outputs, name="delta_rule_finish")
    d_g = None
    if plan.gate == "head":
        d_log, d_carry = found["d_log"] + last["d_log"], jnp.sum(last["d_carry"][:, :, :, 0], -1)
        d_g = rows.gate_gradient(d_log, last["d_write_log"], f.carry * d_carry[..., None], plan)
    return last["d_q"], last["d_k"], found["d_v"], found["d_beta"] + last["d_beta"], d_g


def _gather_kernel(
    plan, *, q, k, v, beta, inverse, new, d_o, d_new, d_v, d_b, d_beta, to_q, to_k,
    coarse=None, fine=None, docs=None, d_log=None,
):  # fmt: skip
    keys, strength = k[...], beta[...]
    row, column = blocks.positions(plan.chunk)
    is_below = row > column
    decay = blocks.pairs(plan, coarse, fine, docs, strict=False)
    key_products = jnp.where(is_below, dot(keys, keys.T) * decay, 0.0)
    lower = strength[:, None] * key_products
    operators = solve.operators(plan, lower, inverse)
    d_lower, d_attend, by_values = 0.0, 0.0, 0.0
    for own in blocks.columns(v, plan.columns):
        right = solve.solve_transposed(*operators, d_new[:, own])
        rounded, values = right.astype(d_b.dtype), new[:, own].T
        d_b[:, own] = rounded
        d_v[:, own] = (strength[:, None] * right).astype(d_v.dtype)
        by_values += jnp.sum(right * v[:, own], axis=1)
        d_lower -= dot(rounded, values)
        d_attend += dot(d_o[:, own], values)
    d_lower = jnp.where(is_below, d_lower, 0.0)
    d_beta[...] = by_values + jnp.sum(d_lower * key_products, axis=1)
    seen = plan.scale * d_attend * decay
    to_q[...] = seen.astype(to_q.dtype)
    if plan.gate == "head":
        # The diagonal has no decay: leaving it out keeps tiny gradients of strong decays exact.
        moved = jnp.where(is_below, seen * dot(q[...], keys.T), 0.0) + d_lower * lower
        d_log[...] = jnp.sum(moved, axis=1) - jnp.sum(moved, axis=0)
    met = d_lower * strength[:, None] * decay
    to_k[...] = (met + met.T).astype(to_k.dtype)


def _finish_kernel(
    plan, *, q, k, beta, new, d_o, states, d_states, d_b, to_q, to_k, read, write, d_q, d_k, d_beta,
    d_log=None, d_write_log=None, d_carry=None,
):  # fmt: skip
    queries, keys, strength, reading = q[...], k[...], beta[...], read[...]
    entering = states[...].T
    d_read = (plan.scale * reading)[:, None] * dot(d_o[...], entering)
    d_q[...] = (dot(to_q[...], keys) + d_read).astype(d_q.dtype)
    if plan.gate == "head":
        d_log_q = jnp.sum(d_read * queries, axis=1)
    k_reads = -reading[:, None] * dot(d_b[...], entering)
    read_by_keys = jnp.sum(k_reads * keys, axis=1)
    d_beta[...] = read_by_keys
    total = strength[:, None] * k_reads
    d_write = write[...][:, None] * dot(new[...], d_states[...].T)
    if plan.gate == "head":
        d_log[...] = d_log_q + strength * read_by_keys
        d_write_log[...] = jnp.sum(d_write * keys, axis=1)
        d_carry[0, :] = _sum_products(states, d_states)
    total += d_write + dot(to_q[...].T, queries) + dot(to_k[...], keys)
    d_k[...] = total.astype(d_k.dtype)


def _sum_products(x, y):
    """Of two refs [K,V], summed over V: [K]."""
    total = 0.0
    for own in blocks.columns(x, 16):
        total += jnp.sum(x[:, own].astype(jnp.float32) * y[:, own], axis=1)
    return total
