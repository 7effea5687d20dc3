"""Products of decayed queries and keys inside a chunk, where every key channel has its own decay.

    P_ij = sum_d q_id k_jd exp(G_id - G_jd)   for j <= i

The chunk is halved until single tokens are left (`chunked.channel_pairs` has the reasons): tokens i of a
right half and j of the left half beside it meet at the border between them, where both decays are at
most 1. Only queries count on the right and only keys on the left, so a level is one full product,
X X^T with a mask, of the matrix X that has decayed queries in some rows and decayed keys in the others.
Legend: C tokens of a chunk.
"""

import jax
import jax.numpy as jnp

from effarch.kernels.delta_rule.pallas_gpu import blocks
from effarch.kernels.delta_rule.pallas_gpu.blocks import Blocks, dot
from effarch.kernels.delta_rule.pallas_gpu.channel_pairs import by_value_head
from effarch.kernels.delta_rule.pallas_gpu.rows import Factors, Plan

_WARPS = 8
_COLUMNS = 32  # key channels of a program of the pull-back


def decayed(q, k, f: Factors, plan: Plan) -> dict[str, jax.Array]:
    """q_read and k_write [B,T,HV,K] in the dtype of q: what meets the states around a chunk."""
    found = dict(q_read=by_value_head(q, plan) * f.read, k_write=by_value_head(k, plan) * f.write)
    return {name: x.astype(q.dtype) for name, x in found.items()}


def products(q, k, f: Factors, plan: Plan) -> jax.Array:
    """P [B,HV,N,C,C] in the dtype of q, 0 between documents."""
    b, chunk = Blocks(plan), plan.chunk
    batch, length = q.shape[:2]
    keys, gates, tile = b.keys(plan.key), b.values(plan.key), b.tile(chunk, chunk)
    inputs = dict(
        q=(q, keys),
        k=(k, keys),
        coarse=(f.coarse, gates),
        fine=(f.fine, gates),
        docs=(f.docs, b.documents()),
    )
    shape = (batch, plan.value_heads, length // chunk, chunk, chunk)
    return blocks.call(
        *(_products_kernel, plan, (length // chunk, batch * plan.value_heads), inputs),
        dict(attend=(shape, q.dtype, tile)),
        name="linear_attention_channel_pairs",
        warps=_WARPS,
    )["attend"]


def pull_back(q, k, d_attend, f: Factors, plan: Plan) -> dict[str, jax.Array]:
    """d_q and d_k [B,T,HV,K], float32, from what is below the diagonal of d_attend [B,HV,N,C,C].

    What crosses documents must be 0.
    """
    width = min(_COLUMNS, plan.key)
    b, chunk = Blocks(plan, width), plan.chunk
    batch, length = q.shape[:2]
    keys, gates = b.key_columns(), b.value_columns()
    inputs = dict(
        q=(q, keys),
        k=(k, keys),
        coarse=(f.coarse, gates),
        fine=(f.fine, gates),
        d_attend=(d_attend, b.tile(chunk, chunk)),
    )
    shape = (batch, length, plan.value_heads, plan.key)
    grid = (plan.key // width, length // chunk, batch * plan.value_heads)
    return blocks.call(
        *(_pull_back_kernel, plan, grid, inputs),
        dict.fromkeys(("d_q", "d_k"), (shape, jnp.float32, gates)),
        name="linear_attention_channel_pairs_back",
    )


def _products_kernel(plan, *, q, k, coarse, fine, attend, docs=None):
    def level(n, total):
        x, *_ = _level(plan, n, q, k, coarse, fine)
        return total + jnp.where(_meets(plan, n), dot(x, x.T), 0.0)

    row, column = blocks.positions(plan.chunk)
    own = jnp.sum(q[...].astype(jnp.float32) * k[...], axis=1)
    zero = jnp.zeros((plan.chunk, plan.chunk), jnp.float32)
    total = jax.lax.fori_loop(0, _levels(plan), level, zero)
    total = jnp.where(row == column, own[:, None], total)
    sees = row >= column
    if docs is not None:
        numbers = docs[...]
        sees &= numbers[:, None] == numbers[None, :]
    attend[...] = jnp.where(sees, total, 0.0).astype(attend.dtype)


def _pull_back_kernel(plan, *, q, k, coarse, fine, d_attend, d_q, d_k):
    row, column = blocks.positions(plan.chunk)
    lower = jnp.where(row > column, d_attend[...].astype(jnp.float32), 0.0)
    both = lower + lower.T

    def level(n, sums):
        to_q, to_k = sums
        x, decay, is_right = _level(plan, n, q, k, coarse, fine)
        met = jnp.where(_meets(plan, n), both, 0.0).astype(x.dtype)
        flows = decay * dot(met, x)
        return to_q + jnp.where(is_right, flows, 0.0), to_k + jnp.where(is_right, 0.0, flows)

    zero = jnp.zeros(q.shape, jnp.float32)
    d_q[...], d_k[...] = jax.lax.fori_loop(0, _levels(plan), level, (zero, zero))


def _levels(plan):
    return plan.chunk.bit_length() - 1


def _level(plan, n, q, k, coarse, fine):
    """Halves of 2^n tokens: X [C,K], the decay of each token to its border [C,K], who is right [C,1]."""
    token = jax.lax.broadcasted_iota(jnp.int32, (plan.chunk,), 0)
    half = jnp.left_shift(1, n)
    border = (token & -(2 * half)) + half - 1
    is_right = ((token & half) != 0)[:, None]
    gap = (coarse[...] - coarse[border, :]) + (fine[...] - fine[border, :])
    decay = jnp.exp2(jnp.where(is_right, 1.0, -1.0) * gap)
    return (jnp.where(is_right, q[...], k[...]) * decay).astype(q.dtype), decay, is_right


def _meets(plan, n):
    """Whose highest different bit is bit n, [C,C]."""
    row, column = blocks.positions(plan.chunk)
    return jnp.right_shift(row ^ column, n) == 1
