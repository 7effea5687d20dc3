"""Products of decayed queries and keys inside a chunk, where every key channel has its own decay.

    P_ij = sum_d q_id k_jd exp(G_id - G_jd)   for j <= i,  and the same with k_i for j < i

The chunk is halved until single tokens are left (`chunked.channel_pairs` has the reasons): tokens i of a
right half and j of the left half beside it meet at the border between them, where both decays are at
most 1. A level is one full product with a mask.
Legend: C tokens of a chunk.
"""

import jax
import jax.numpy as jnp

from effarch.kernels.delta_rule.pallas_gpu import blocks
from effarch.kernels.delta_rule.pallas_gpu.blocks import Blocks, dot
from effarch.kernels.delta_rule.pallas_gpu.rows import Factors, Plan

_WARPS = 8
_COLUMNS = 32  # key channels of a program of the pull-back


def decayed(q, k, f: Factors, plan: Plan) -> dict[str, jax.Array]:
    """q_read, k_read and k_write [B,T,HV,K] and attend (P) [B,HV,N,C,C] in the dtype of q; key_products
    (strictly lower) [B,HV,N,C,C] in float32."""
    b, chunk = Blocks(plan), plan.chunk
    batch, length = q.shape[:2]
    tiles = (batch, plan.value_heads, length // chunk, chunk, chunk)
    outputs = dict(
        key_products=(tiles, jnp.float32, b.tile(chunk, chunk)),
        attend=(tiles, q.dtype, b.tile(chunk, chunk)),
    )
    grid = (length // chunk, batch * plan.value_heads)
    found = blocks.call(
        *(_products_kernel, plan, grid, _inputs(q, k, f, plan), outputs),
        name="delta_rule_channel_pairs",
        warps=_WARPS,
    )
    rows, keys = (by_value_head(x, plan) for x in (q, k))
    factors = dict(q_read=rows * f.read, k_read=keys * f.read, k_write=keys * f.write)
    return found | {name: x.astype(q.dtype) for name, x in factors.items()}


def pull_back(q, k, d_attend, d_key_products, f: Factors, plan: Plan) -> dict[str, jax.Array]:
    """d_q, d_reader and d_writer (of k as row and as column) [B,T,HV,K], float32.

    Only the strictly lower triangles count; what crosses documents must be 0.
    """
    width = min(_COLUMNS, plan.key)
    b, chunk = Blocks(plan, width), plan.chunk
    batch, length = q.shape[:2]
    inputs = dict(
        q=(q, b.key_columns()),
        k=(k, b.key_columns()),
        coarse=(f.coarse, b.value_columns()),
        fine=(f.fine, b.value_columns()),
        d_attend=(d_attend, b.tile(chunk, chunk)),
        d_key_products=(d_key_products, b.tile(chunk, chunk)),
    )
    shape = (batch, length, plan.value_heads, plan.key)
    outputs = dict.fromkeys(
        ("d_q", "d_reader", "d_writer"), (shape, jnp.float32, b.value_columns())
    )
    grid = (plan.key // width, length // chunk, batch * plan.value_heads)
    return blocks.call(
        *(_pull_back_kernel, plan, grid, inputs, outputs),
        name="delta_rule_channel_pairs_back",
    )


def by_value_head(x, plan):
    """[B,T,H,K] -> float32 [B,T,HV,K]."""
    return jnp.repeat(x.astype(jnp.float32), plan.group, axis=2)


def _inputs(q, k, f, plan):
    b = Blocks(plan)
    keys, gates = b.keys(plan.key), b.values(plan.key)
    return dict(
        q=(q, keys),
        k=(k, keys),
        coarse=(f.coarse, gates),
        fine=(f.fine, gates),
        docs=(f.docs, b.documents()),
    )


def _products_kernel(plan, *, q, k, coarse, fine, key_products, attend, docs=None):
    row, column = blocks.positions(plan.chunk)
    own = jnp.sum(q[...].astype(jnp.float32) * k[...], axis=1)
    seen = jnp.where(row == column, own[:, None], 0.0)

    def level(n, sums):
        products, seen = sums
        decay, meets = _level(plan, n, coarse, fine)
        decayed_keys = (k[...] * decay).astype(k.dtype)
        left = decayed_keys.T
        products += jnp.where(meets, dot(decayed_keys, left), 0.0)
        seen += jnp.where(meets, dot((q[...] * decay).astype(q.dtype), left), 0.0)
        return products, seen

    products = jnp.zeros((plan.chunk, plan.chunk), jnp.float32)
    products, seen = jax.lax.fori_loop(0, _levels(plan), level, (products, seen))
    if docs is not None:
        numbers = docs[...]
        is_same = numbers[:, None] == numbers[None, :]
        products, seen = (jnp.where(is_same, x, 0.0) for x in (products, seen))
    key_products[...] = products
    attend[...] = seen.astype(attend.dtype)


def _pull_back_kernel(
    plan, *, q, k, coarse, fine, d_attend, d_key_products, d_q, d_reader, d_writer
):
    dtype = q.dtype

    def level(n, sums):
        to_q, to_reader, to_writer = sums
        decay, meets = _level(plan, n, coarse, fine)
        decayed_keys = (k[...] * decay).astype(dtype)
        met, met_keys = (
            jnp.where(meets, x[...].astype(jnp.float32), 0.0).astype(dtype)
            for x in (d_attend, d_key_products)
        )
        to_q += decay * dot(met, decayed_keys)
        to_reader += decay * dot(met_keys, decayed_keys)
        decayed_queries = (q[...] * decay).astype(dtype)
        to_writer += decay * (dot(met.T, decayed_queries) + dot(met_keys.T, decayed_keys))
        return to_q, to_reader, to_writer

    zero = jnp.zeros(q.shape, jnp.float32)
    sums = jax.lax.fori_loop(0, _levels(plan), level, (zero, zero, zero))
    for ref, total in zip((d_q, d_reader, d_writer), sums):
        ref[...] = total


def _levels(plan):
    return plan.chunk.bit_length() - 1


def _level(plan, n, coarse, fine):
    """Halves of 2^n tokens: the decay of each token to its border [C,K], and who meets there."""
    token = jax.lax.broadcasted_iota(jnp.int32, (plan.chunk,), 0)
    half = jnp.left_shift(1, n)
    border = (token & -(2 * half)) + half - 1
    gap = (coarse[...] - coarse[border, :]) + (fine[...] - fine[border, :])
    is_right = (token & half) != 0
    decay = jnp.exp2(jnp.where(is_right[:, None], gap, -gap))
    row, column = blocks.positions(plan.chunk)
    # The highest bit in which the two differ tells where they meet.
    meets = (row > column) & (jnp.right_shift(row ^ column, n) == 1)
    return decay, meets
