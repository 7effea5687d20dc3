"""Linear attention forward: one Pallas TPU kernel.

For one head and chunk, with the factors of `tpu_head_gates` or `tpu_channel_gates`:

    O = scale ((read Q) S + P V)     P = lower(Q K^T pairs)     S <- carry S + (write K)^T V

Legend: N chunks of C tokens, HB value heads a grid step; K, V widths of heads, multiples of 128.
"""

import jax.numpy as jnp
from jax.experimental import pallas as pl

from effarch.kernels.chunked import tpu_blocks, tpu_channel_gates, tpu_heads, tpu_rows
from effarch.kernels.chunked.tpu_heads import dot, lanes_of

_HEADS_A_ROUND = 2


def forward(q, k, v, g, initial, marks, plan: tpu_rows.Plan, *, saves: bool):
    """o [B,T,HV*V], the final state [B,HV,K,V] and, with `saves`, the states that enter the chunks.

    q, k [B,T,H*K] and v [B,T,HV*V] of one dtype; g from `tpu_channel_gates.summed`, marks [B,N,8,C]. The
    entering states are [B,N,HV,K,V] in the dtype of q.
    """
    batch, chunks = marks.shape[:2]
    heads, chunk, key, value = plan.heads, plan.chunk, plan.key, plan.value
    value_heads = initial.shape[1]

    def at(n):
        return n

    keys = tpu_blocks.tokens(plan, heads // plan.group * key, at)
    values = tpu_blocks.tokens(plan, heads * value, at)
    inputs = [
        *((keys, q), (keys, k), (values, v), (tpu_blocks.sums(plan, g, at), g)),
        *((tpu_blocks.marks(plan, at), marks), (tpu_blocks.whole(), initial)),
    ]
    outputs = [(values, v.shape, v.dtype), (tpu_blocks.state(plan), initial.shape, jnp.float32)]
    if saves:
        states = (batch, chunks, value_heads, key, value)
        outputs.append((tpu_blocks.per_head(plan, key, value, at), states, q.dtype))
    return tpu_blocks.call(
        *(_kernel, plan, (batch, value_heads // heads, chunks), inputs, outputs),
        flops=(20 if plan.per_channel else 2) * chunk * key + 4 * key * value + 2 * chunk * value,
        name="linear_attention_forward",
    )


def _kernel(plan, q_ref, k_ref, v_ref, g_ref, marks_ref, initial_ref, o_ref, state_ref, *saved):
    row, group, step = (pl.program_id(x) for x in range(3))

    @pl.when(step == 0)
    def _():
        tpu_blocks.load_state(plan, initial_ref, state_ref, row, group)

    factors = tpu_channel_gates.gates(g_ref, None, marks_ref[...], plan)

    def advance(head):
        own_keys, own = lanes_of(head // plan.group, plan.key), lanes_of(head, plan.value)
        sums = tpu_channel_gates.sums_of(g_ref, head, plan)
        attend, q_read, k_written, carry = yield from factors.parts(
            q_ref[:, own_keys], k_ref[:, own_keys], head, sums, corrects=False
        )
        state, v = state_ref[0, head], v_ref[:, own]
        narrow = state.astype(v.dtype)
        o = dot(jnp.concatenate([q_read, attend], 1), jnp.concatenate([narrow, v]))
        state_ref[0, head] = carry * state + dot(k_written, v)
        yield
        o_ref[:, own] = (plan.scale * o).astype(o_ref.dtype)
        for ref in saved:
            ref[head] = narrow

    heads = range(plan.heads)
    tpu_heads.interleave([(head // _HEADS_A_ROUND, advance(head)) for head in heads])
