"""The parallel part of the gradient where every key channel has its own decay.

Notation as in `backward`: a kernel for dV, dP and what flows to the decayed keys and queries, then
`channel_pairs.pull_back` for the products inside the chunk.
"""

import jax.numpy as jnp

from effarch.kernels.delta_rule.pallas_gpu import blocks, rows
from effarch.kernels.delta_rule.pallas_gpu.blocks import Blocks, dot
from effarch.kernels.delta_rule.pallas_gpu.channel_pairs import by_value_head
from effarch.kernels.delta_rule.pallas_gpu.rows import Factors, Plan
from effarch.kernels.linear_attention.pallas_gpu import channel_pairs


def gather(q, k, v, f: Factors, keys: dict, done: dict, d_o, d_states, plan: Plan) -> tuple:
    """Gradients of q and k [B,T,HV,K], v and g; `done` as `forward` says, `keys` has k_write."""
    found = _gather(v, f, keys["k_write"], done, d_o, d_states, plan)
    by_pairs = channel_pairs.pull_back(q, k, found["d_attend"], f, plan)
    q, k = (by_value_head(x, plan) for x in (q, k))
    d_q = by_pairs["d_q"] + f.read * found["d_q_read"]
    d_write = f.write * found["d_k_write"]
    d_g = rows.gate_gradient(
        q * d_q - k * by_pairs["d_k"], k * d_write, f.carry * found["d_carry"][:, :, :, 0], plan
    )
    # The diagonal of P has no decay and joins only after the gate has been served.
    diagonal = jnp.diagonal(found["d_attend"].astype(jnp.float32), axis1=-2, axis2=-1)
    diagonal = diagonal.reshape(*diagonal.shape[:2], -1).swapaxes(1, 2)[..., None]
    return d_q + diagonal * k, by_pairs["d_k"] + d_write + diagonal * q, found["d_v"], d_g


def _gather(v, f, k_write, done, d_o, d_states, plan):
    b, chunk = Blocks(plan), plan.chunk
    batch, length = v.shape[:2]
    chunks, heads, dtype = length // chunk, plan.value_heads, k_write.dtype
    key, value, tile = b.values(plan.key), b.values(plan.value), b.tile(chunk, chunk)
    state = b.tile(plan.key, plan.value)
    inputs = dict(
        k_write=(k_write, key),
        v=(v, value),
        d_o=(d_o, value),
        attend=(done["attend"], tile),
        states=(done["states"], state),
        d_states=(d_states, state),
        docs=(f.docs, b.documents()),
    )
    outputs = dict(
        d_v=(v.shape, v.dtype, value),
        d_attend=((batch, heads, chunks, chunk, chunk), dtype, tile),
        d_carry=((batch, heads, chunks, 1, plan.key), jnp.float32, b.tile(1, plan.key)),
        **dict.fromkeys(("d_q_read", "d_k_write"), (k_write.shape, dtype, key)),
    )
    grid, name = (chunks, batch * heads), "linear_attention_gather"
    return blocks.call(_gather_kernel, plan, grid, inputs, outputs, name=name, warps=8)


def _gather_kernel(
    plan, *, k_write, v, d_o, attend, states, d_states, d_v, d_attend, d_carry, d_q_read, d_k_write,
    docs=None,
):  # fmt: skip
    dtype = d_attend.dtype
    d_values = plan.scale * dot(attend[...].T, d_o[...]) + dot(k_write[...], d_states[...])
    d_v[...] = d_values.astype(d_v.dtype)
    row, column = blocks.positions(plan.chunk)
    sees = row >= column
    if docs is not None:
        numbers = docs[...]
        sees &= numbers[:, None] == numbers[None, :]
    d_seen = plan.scale * dot(d_o[...], v[...].T)
    d_attend[...] = jnp.where(sees, d_seen, 0.0).astype(dtype)
    d_q_read[...] = (plan.scale * dot(d_o[...], states[...].T)).astype(dtype)
    d_k_write[...] = dot(v[...], d_states[...].T).astype(dtype)
    d_carry[0, :] = jnp.sum(states[...].astype(jnp.float32) * d_states[...], axis=1)
