"""The gradient of the gated delta rule: three GPU kernels, from the last chunk to the first.

Forward of a chunk (`forward`), with A = (I + L)^-1 and B = beta (V - (read K) S):

    V' = A B       O = scale ((read Q) S + P V')       S' = carry S + K^T (write V')

    local    (parallel)     scale P^T dO, what O says of V'
    retreat  (in sequence)  dV' = local + write (K dS')
                            dS  = carry dS' + scale (read Q)^T dO - W^T dV'
    gather   (parallel)     dB = A^T dV'     dL = -strict_lower(dB V'^T)     dP = scale lower(dO V'^T)

and from these all gradients of the inputs. What flows to the logarithm of a factor is the factor times
its gradient; `rows.gate_gradient` sums that over time.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from effarch.kernels.delta_rule.pallas_gpu import blocks, channel_pairs, forward, rows, solve
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
    found = _gather(q, k, v, beta, f, keys, done, d_o, d_states, d_new, plan)
    finish = _finish_channels if plan.per_channel else _finish_heads
    d_q, d_k, d_g = finish(q, k, f, found, plan)
    d_q, d_k = (_by_key_head(x, plan).astype(q.dtype) for x in (d_q, d_k))
    return d_q, d_k, found["d_v"], found["d_beta"], d_g, d_initial


def _finish_heads(q, k, f, found, plan):
    d_g = None
    if plan.gate == "head":
        d_carry_log = f.carry * jnp.sum(found["d_carry"], axis=-1, keepdims=True)
        d_g = rows.gate_gradient(found["d_log"], found["d_write_log"], d_carry_log, plan)
    return found["d_q"], found["d_k"], d_g


def _finish_channels(q, k, f, found, plan):
    by_pairs = channel_pairs.pull_back(q, k, found["d_attend"], found["d_key_products"], f, plan)
    q, k = (channel_pairs.by_value_head(x, plan) for x in (q, k))
    d_q = by_pairs["d_q"] + f.read * found["d_q_read"]
    d_reader = by_pairs["d_reader"] + f.read * found["d_k_read"]
    d_write = f.write * found["d_k_write"]
    d_g = rows.gate_gradient(
        q * d_q + k * (d_reader - by_pairs["d_writer"]),
        k * d_write,
        f.carry * found["d_carry"],
        plan,
    )
    # The diagonal of P has no decay and joins only after the gate has been served.
    diagonal = jnp.diagonal(found["d_attend"].astype(jnp.float32), axis1=-2, axis2=-1)
    diagonal = diagonal.reshape(*diagonal.shape[:2], -1).swapaxes(1, 2)[..., None]
    d_k = d_reader + by_pairs["d_writer"] + d_write + diagonal * q
    return d_q + diagonal * k, d_k, d_g


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


def _gather(q, k, v, beta, f, keys, done, d_o, d_states, d_new, plan):
    b, chunk = Blocks(plan), plan.chunk
    batch, length = v.shape[:2]
    chunks, heads = length // chunk, plan.value_heads
    key, value, tile = b.values(plan.key), b.values(plan.value), b.tile(chunk, chunk)
    inputs = dict(
        v=(v, value),
        beta=(beta, b.per_token()),
        inverse=(done["inverse"], b.tile(solve.BLOCK, chunk)),
        states=(done["states"], b.tile(plan.key, plan.value)),
        new=(done["new"], value),
        d_o=(d_o, value),
        d_states=(d_states, b.tile(plan.key, plan.value)),
        d_new=(d_new, value),
    )
    tokens, by_head = (batch, length, heads, plan.key), (batch, heads, length)
    outputs = dict(
        d_v=(v.shape, v.dtype, value),
        d_beta=(by_head, jnp.float32, b.per_token()),
    )
    if plan.gate != "none":
        shape = (batch, heads, chunks, 1, plan.key)
        outputs["d_carry"] = (shape, jnp.float32, b.tile(1, plan.key))
    if plan.per_channel:
        inputs |= dict(k_read=(keys["k_read"], key), docs=(f.docs, b.documents()))
        inputs["key_products"] = (done["key_products"], tile)
        for name in ("d_attend", "d_key_products"):
            outputs[name] = ((batch, heads, chunks, chunk, chunk), q.dtype, tile)
        for name in ("d_q_read", "d_k_read", "d_k_write"):
            outputs[name] = (tokens, q.dtype, key)
        kernel = _gather_channels_kernel
    else:
        inputs |= dict(q=(q, b.keys(plan.key)), k=(k, b.keys(plan.key)))
        inputs |= forward.head_factors(f, b, plan, "read", "write")
        dtype = q.dtype if plan.group == 1 else jnp.float32
        outputs |= dict(d_q=(tokens, dtype, key), d_k=(tokens, dtype, key))
        if plan.gate == "head":
            for name in ("d_log", "d_write_log"):
                outputs[name] = (by_head, jnp.float32, b.per_token())
        kernel = _gather_heads_kernel
    grid = (chunks, batch * heads)
    found = blocks.call(kernel, plan, grid, inputs, outputs, name="delta_rule_gather", warps=8)
    if plan.gate != "none":
        found["d_carry"] = found["d_carry"][:, :, :, 0]
    return found


def _solve_back(plan, lower, inverse, new, d_o, d_new):
    """dB, dL and dP, float32; the latter two are not masked."""
    x, m = solve.operators(plan, lower, inverse)
    d_b = solve.solve_transposed(x, m, d_new[...])
    values = new[...].T
    return d_b, -dot(d_b.astype(new.dtype), values), plan.scale * dot(d_o[...], values)


def _gather_heads_kernel(
    plan, *, q, k, v, beta, inverse, states, new, d_o, d_states, d_new, read, write, d_v, d_beta,
    d_q, d_k, coarse=None, fine=None, docs=None, d_carry=None, d_log=None, d_write_log=None,
):  # fmt: skip
    dtype, queries, keys, strength = q.dtype, q[...], k[...], beta[...]
    reading, writing = read[...][:, None], write[...][:, None]
    row, column = blocks.positions(plan.chunk)
    is_below = row > column
    decay = blocks.pairs(plan, coarse, fine, docs, strict=False)
    key_products = jnp.where(is_below, dot(keys, keys.T) * decay, 0.0)
    lower = strength[:, None] * key_products
    d_b, d_lower, d_attend = _solve_back(plan, lower, inverse, new, d_o, d_new)
    d_lower = jnp.where(is_below, d_lower, 0.0)
    d_v[...] = (strength[:, None] * d_b).astype(d_v.dtype)
    d_products = d_attend * decay
    if plan.gate == "head":
        # The diagonal has no decay: leaving it out keeps tiny gradients of strong decays exact.
        moved = jnp.where(is_below, d_products * dot(queries, keys.T), 0.0) + d_lower * lower
        d_logs = jnp.sum(moved, axis=1) - jnp.sum(moved, axis=0)
    d_key_products = d_lower * strength[:, None] * decay
    d_key_products = (d_key_products + d_key_products.T).astype(dtype)
    d_products = d_products.astype(dtype)

    entering = states[...].T
    d_q_read = reading * (plan.scale * dot(d_o[...], entering))
    d_q[...] = (dot(d_products, keys) + d_q_read).astype(d_q.dtype)
    k_reads = -reading * dot(d_b.astype(dtype), entering)
    d_k_write = writing * dot(new[...], d_states[...].T)
    by_pairs = dot(d_products.T, queries) + dot(d_key_products, keys)
    d_k[...] = (by_pairs + d_k_write + strength[:, None] * k_reads).astype(d_k.dtype)
    read_by_keys = jnp.sum(k_reads * keys, axis=1)
    d_beta[...] = (
        jnp.sum(d_b * v[...], axis=1) + read_by_keys + jnp.sum(d_lower * key_products, axis=1)
    )
    if plan.gate == "head":
        d_log[...] = d_logs + jnp.sum(d_q_read * queries, axis=1) + strength * read_by_keys
        d_write_log[...] = jnp.sum(d_k_write * keys, axis=1)
        _store_carry(d_carry, states, d_states)


def _gather_channels_kernel(
    plan, *, k_read, v, beta, key_products, inverse, states, new, d_o, d_states, d_new, d_v, d_beta,
    d_carry, d_attend, d_key_products, d_q_read, d_k_read, d_k_write, docs=None,
):  # fmt: skip
    dtype, strength, products = new.dtype, beta[...], key_products[...]
    lower = strength[:, None] * products
    d_b, d_lower, d_seen = _solve_back(plan, lower, inverse, new, d_o, d_new)
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
    _store_carry(d_carry, states, d_states)


def _store_carry(d_carry, states, d_states):
    """<S, dS'> summed over V: [K]."""
    d_carry[0, :] = jnp.sum(states[...].astype(jnp.float32) * d_states[...], axis=1)
