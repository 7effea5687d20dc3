"""The parallel part of the gradient where every key channel has its own decay.

Notation as in `backward`: a kernel for dB, dL, dP and what flows to the decayed keys and queries, then
`channel_pairs.pull_back` for the products inside the chunk.
"""

import jax.numpy as jnp

from effarch.kernels.delta_rule.pallas_gpu import blocks, channel_pairs, rows, solve
from effarch.kernels.delta_rule.pallas_gpu.blocks import Blocks, dot
from effarch.kernels.delta_rule.pallas_gpu.rows import Factors, Plan


def gather(
    q, k, v, beta, f: Factors, keys: dict, done: dict, d_o, d_states, d_new, plan: Plan
) -> tuple:
    """Gradients of q and k [B,T,HV,K], v, beta and g; `done` as `forward` says.

    `keys`: k_read, decayed keys [B,T,HV,K].
    """
    found = _gather(v, beta, f, keys, done, d_o, d_states, d_new, plan)
    by_pairs = channel_pairs.pull_back(q, k, found["d_attend"], found["d_key_products"], f, plan)
    q, k = (channel_pairs.by_value_head(x, plan) for x in (q, k))
    d_q = by_pairs["d_q"] + f.read * found["d_q_read"]
    d_reader = by_pairs["d_reader"] + f.read * found["d_k_read"]
    d_write = f.write * found["d_k_write"]
    d_g = rows.gate_gradient(
        q * d_q + k * (d_reader - by_pairs["d_writer"]),
        k * d_write,
        f.carry * found["d_carry"][:, :, :, 0],
        plan,
    )
    # The diagonal of P has no decay and joins only after the gate has been served.
    diagonal = jnp.diagonal(found["d_attend"].astype(jnp.float32), axis1=-2, axis2=-1)
    diagonal = diagonal.reshape(*diagonal.shape[:2], -1).swapaxes(1, 2)[..., None]
    d_k = d_reader + by_pairs["d_writer"] + d_write + diagonal * q
    return d_q + diagonal * k, d_k, found["d_v"], found["d_beta"], d_g


def _gather(v, beta, f, keys, done, d_o, d_states, d_new, plan):
    b, chunk = Blocks(plan), plan.chunk
    batch, length = v.shape[:2]
    chunks, heads = length // chunk, plan.value_heads
    key, value, tile = b.values(plan.key), b.values(plan.value), b.tile(chunk, chunk)
    state, per_token = b.tile(plan.key, plan.value), b.per_token()
    dtype = done["new"].dtype
    inputs = dict(
        v=(v, value),
        beta=(beta, per_token),
        k_read=(keys["k_read"], key),
        docs=(f.docs, b.documents()),
        key_products=(done["key_products"], tile),
        inverse=(done["inverse"], b.tile(solve.BLOCK, chunk)),
        states=(done["states"], state),
        new=(done["new"], value),
        d_o=(d_o, value),
        d_states=(d_states, state),
        d_new=(d_new, value),
    )
    pairs = ((batch, heads, chunks, chunk, chunk), dtype, tile)
    tokens = ((batch, length, heads, plan.key), dtype, key)
    outputs = dict(
        d_v=(v.shape, v.dtype, value),
        d_beta=((batch, heads, length), jnp.float32, per_token),
        d_carry=((batch, heads, chunks, 1, plan.key), jnp.float32, b.tile(1, plan.key)),
        **dict.fromkeys(("d_attend", "d_key_products"), pairs),
        **dict.fromkeys(("d_q_read", "d_k_read", "d_k_write"), tokens),
    )
    grid = (chunks, batch * heads)
    name = "delta_rule_gather"
    return blocks.call(_gather_kernel, plan, grid, inputs, outputs, name=name, warps=8)


def _gather_kernel(
    plan, *, k_read, v, beta, key_products, inverse, states, new, d_o, d_states, d_new, d_v, d_beta,
    d_carry, d_attend, d_key_products, d_q_read, d_k_read, d_k_write, docs=None,
):  # fmt: skip
    dtype, strength, products = new.dtype, beta[...], key_products[...]
    lower = strength[:, None] * products
    d_b = solve.solve_transposed(*solve.operators(plan, lower, inverse), d_new[...])
    values = new[...].T
    d_lower, d_seen = -dot(d_b.astype(dtype), values), plan.scale * dot(d_o[...], values)
    row, column = blocks.positions(plan.chunk)
    sees = row >= column
    if docs is not None:
        numbers = docs[...]
        sees &= numbers[:, None] == numbers[None, :]
    d_lower = jnp.where(sees & (row > column), d_lower, 0.0)
    d_v[...] = (strength[:, None] * d_b).astype(d_v.dtype)
    d_attend[...] = jnp.where(sees, d_seen, 0.0).astype(dtype)
    d_key_products[...] = (strength[:, None] * d_lower).astype(dtype)
    entering = states[...].T
    d_q_read[...] = (plan.scale * dot(d_o[...], entering)).astype(dtype)
    k_reads = -dot(d_b.astype(dtype), entering)
    d_k_read[...] = (strength[:, None] * k_reads).astype(dtype)
    d_k_write[...] = dot(new[...], d_states[...].T).astype(dtype)
    read_by_keys = jnp.sum(k_reads * k_read[...], axis=1)
    d_beta[...] = jnp.sum(d_b * v[...], axis=1) + read_by_keys + jnp.sum(d_lower * products, axis=1)
    d_carry[0, :] = jnp.sum(states[...].astype(jnp.float32) * d_states[...], axis=1)
