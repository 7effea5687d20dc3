"""The gated delta rule forward: one Pallas TPU kernel.

For one head and chunk, with the factors of the gates (beta scales columns, so that w = V' / beta):

    (I + L) w = V - (read K) S       L = strict_lower(K K^T pairs)
    O = scale ((read Q) S + P w)     P = (Q K^T) pairs
    S <- carry S + (write K)^T w

The system is solved by blocks of 32 rows. The diagonal blocks are inverted beforehand, by substitution
in blocks of 16 (all side by side on the lanes) and a merge of each two; then block after block

    w_j = X_j r_j,     r_(j+1) = rhs_(j+1) - L_(j+1, 0..j) [w_0 ... w_j].

All products take one pass; the inverse of the whole I + L, rounded, would be slower and less accurate.
What bfloat16 loses is lost in factors that carry a decay or beta, because over keys that are alike
their errors add up: `precise` keeps L, P, write K and the inverses in two parts, [high | low].

Step n of the sequential grid axis runs the part of chunk n that knows no state (`_prepare`) against
the state pass of chunk n - 1 (`_advance`), all heads of both interleaved; what the first leaves for the
second lies in scratch memory, two slots in turn. At n = 0 the state pass runs on garbage: what it
wrote is written again at n = 1, when the initial state is loaded.
Legend: N chunks of C tokens, J groups of HB value heads; K, V widths of heads, multiples of 128.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from effarch.kernels.chunked import tpu_blocks, tpu_channel_gates, tpu_heads, tpu_rows
from effarch.kernels.chunked.tpu_heads import dot, dot_narrow, lanes_of, narrow, split

BLOCK = 32
"""Rows of the blocks that are solved at once."""

SMALL = 16
"""Rows of the blocks that are inverted by substitution; two of them make a block."""

_HEADS_A_ROUND, _CHANNEL_HEADS_A_ROUND = 2, 1
"""So many heads start to prepare in each round, while all advance. KDA on v6e takes 3.81 bundles a token
and head with 1, 3.96 and more with 2 and 4, what is saved for the gradient included."""


def forward(q, k, v, beta, g, initial, marks, plan: tpu_rows.Plan, *, saves: bool):
    """o [B,T,HV*V] and the final state [B,HV,K,V]; with `saves` also what the gradient needs.

    q, k [B,T,H*K] and v [B,T,HV*V] of one dtype; beta [B,N,J,HB,C], g from `summed` of the
    gates, marks [B,N,8,C]. Saved, in the dtype of q: the states that enter the chunks
    [B,N,HV,K,V], w [B,T,HV*V], the inverted diagonal blocks side by side [B,N,HV,32,C], and for decays
    per channel L and P [B,N,HV,C,C].
    """
    batch, chunks, groups = beta.shape[:3]
    heads, chunk, key, value = plan.heads, plan.chunk, plan.key, plan.value
    keys = tpu_blocks.tokens(plan, heads // plan.group * key, now := _now(chunks))
    values = tpu_blocks.tokens(plan, heads * value, _before)
    inputs = [
        *((keys, q), (keys, k), (values, v), (tpu_blocks.per_token(plan, heads, now), beta)),
        *((tpu_blocks.sums(plan, g, now), g), (tpu_blocks.marks(plan, now), marks)),
        (tpu_blocks.whole(), initial),
    ]
    outputs = [(values, v.shape, v.dtype), (tpu_blocks.state(plan), initial.shape, jnp.float32)]
    if saves:
        sizes = [(key, value), (BLOCK, chunk), *[(chunk, chunk)] * (2 * plan.per_channel)]
        for rows, lanes in sizes:
            spec = tpu_blocks.per_head(plan, rows, lanes, _before)
            outputs.append((spec, (batch, chunks, groups * heads, rows, lanes), q.dtype))
        outputs.insert(3, (values, v.shape, q.dtype))
    wide = chunk * (2 if plan.precise and q.dtype == jnp.bfloat16 else 1)
    prepared = [
        *((BLOCK, wide), (chunk, wide), (chunk, key)),
        *((chunk, wide), (chunk, key), (key, wide)),
    ]
    scratch = [pltpu.VMEM((2, heads, *x), q.dtype) for x in prepared]
    carry = (key if plan.per_channel else 1, value)
    scratch.append(pltpu.VMEM((2, heads, *carry), jnp.float32))
    return tpu_blocks.call(
        *(_kernel, plan, (batch, groups, chunks + 1), inputs, outputs),
        flops=(24 if plan.per_channel else 4) * chunk * key + 6 * key * value + 4 * chunk * value,
        name="delta_rule_forward",
        scratch=scratch,
    )


def _now(chunks):
    return lambda n: jnp.minimum(n, chunks - 1)


def _before(n):
    return jnp.maximum(n - 1, 0)


def _kernel(
    plan, q_ref, k_ref, v_ref, beta_ref, g_ref, marks_ref, initial_ref, o_ref, state_ref, *rest
):
    saved, prepared = rest[:-7], rest[-7:]
    row, group, step = (pl.program_id(x) for x in range(3))
    heads = range(plan.heads)

    @pl.when(step == 1)
    def _():
        tpu_blocks.load_state(plan, initial_ref, state_ref, row, group)

    factors = tpu_channel_gates.gates(g_ref, beta_ref[...], marks_ref[...], plan)
    fill, use = jax.lax.rem(step, 2), jax.lax.rem(step + 1, 2)

    def prepare(head):
        own = lanes_of(head // plan.group, plan.key)
        sums = tpu_channel_gates.sums_of(g_ref, head, plan)
        *parts, lower, k_read = yield from factors.parts(
            q_ref[:, own], k_ref[:, own], head, sums, corrects=True
        )
        inverse = yield from _invert_diagonal_blocks(lower, q_ref.dtype, plan.precise)
        rounded = (narrow(x, q_ref.dtype, plan.precise) for x in (inverse, lower))
        for ref, part in zip(prepared, (*rounded, k_read, *parts)):
            ref[fill, head] = part

    def advance(head):
        own = lanes_of(head, plan.value)
        parts = [ref[use, head] for ref in prepared]
        state = state_ref[0, head]
        entering = state.astype(q_ref.dtype)
        o, w, after = yield from _advance(v_ref[:, own], *parts, state, entering)
        o_ref[:, own] = (plan.scale * o).astype(o_ref.dtype)
        state_ref[0, head] = after
        inverse, lower, _, attend, *_ = parts
        for ref, x in zip(saved, (entering, w, inverse, lower, attend)):
            if x is w:
                ref[:, own] = x
            else:
                ref[head] = x[:, : ref.shape[-1]]

    a_round = _CHANNEL_HEADS_A_ROUND if plan.per_channel else _HEADS_A_ROUND
    starting = [(head // a_round, prepare(head)) for head in heads]
    tpu_heads.interleave([(0, advance(head)) for head in heads] + starting)


def _invert_diagonal_blocks(lower, dtype, precise):
    """[32,C] float32: the inverses of the blocks of 32 rows of I + L, side by side on the lanes."""
    inverse = yield from _substitute(lower)
    block_of_lane = jax.lax.broadcasted_iota(jnp.int32, inverse.shape, 1) // SMALL
    is_left = block_of_lane % 2 == 0
    blocks = range(lower.shape[0] // SMALL)

    def spread(x, below):
        """[C,C]: what lies in the lanes of block b goes to the rows of block b + below."""
        return jnp.concatenate(
            [jnp.where(block_of_lane == block - below, x, 0) for block in blocks]
        )

    def product(a, b):
        (a, *a_low), (b, *b_low) = split(a, dtype), split(b, dtype)
        if not precise or not a_low:
            return dot(a, b)
        return dot(jnp.concatenate([a, *a_low, a], 1), jnp.concatenate([b, b, *b_low]))

    corner = jnp.zeros_like(inverse)
    for block in blocks[0::2]:
        own = slice((block + 1) * SMALL, (block + 2) * SMALL)
        corner = jnp.where(block_of_lane == block, lower[own], corner)
    corner = product(corner, spread(inverse, 0))
    yield
    corner = product(inverse, spread(corner, 1))
    yield
    return jnp.concatenate([jnp.where(is_left, inverse, 0), jnp.where(is_left, -corner, inverse)])


def _substitute(lower):
    """[16,C] float32: the inverses of the blocks of 16 rows of I + L, side by side on the lanes.

    Once row s of the inverse is known, L_is times it leaves every row i > s, in all blocks at once.
    """
    chunk = lower.shape[0]
    row, lane = (jax.lax.broadcasted_iota(jnp.int32, (SMALL, chunk), x) for x in (0, 1))
    packed = jnp.zeros((SMALL, chunk), jnp.float32)
    for start in range(0, chunk, SMALL):
        is_mine = (lane // SMALL == start // SMALL) & (row > lane % SMALL)
        packed = jnp.where(is_mine, lower[start : start + SMALL], packed)
    identity = jnp.where(row == lane % SMALL, 1.0, 0.0)
    tiles = [slice(x, x + 8) for x in range(0, SMALL, 8)]
    packed, inverse = ([x[tile] for tile in tiles] for x in (packed, identity))
    first_lane = (lane // SMALL * SMALL)[:8]
    for step in range(SMALL - 1):
        known = inverse[step // 8][step % 8 : step % 8 + 1]
        for i in range((step + 1) // 8, len(tiles)):
            factor = jnp.take_along_axis(
                packed[i], first_lane + step, axis=1, mode="promise_in_bounds"
            )
            inverse[i] = inverse[i] - factor * known
        if step % 3 == 2:
            yield
    return jnp.concatenate(inverse)


def _advance(v, inverse, lower, k_read, attend, q_read, k_written, carry, state, entering):
    """O / scale, w in the dtype of the operands, and the leaving state."""
    chunk = v.shape[0]
    parts = range(0, inverse.shape[1], chunk)  # high, and if precise low
    rhs = v - dot(k_read, entering)
    yield
    solved = []
    for start in range(0, chunk, BLOCK):
        own = slice(start, start + BLOCK)
        left = rhs[own]
        if start:
            known = jnp.concatenate(solved)
            for part in parts:
                left -= dot(lower[own, part : part + start], known)
            yield
        blocks = [inverse[:, part + start : part + start + BLOCK] for part in parts]
        w = [dot(block, left.astype(v.dtype)) for block in blocks]
        solved.append(functools.reduce(jnp.add, w).astype(v.dtype))
        yield
    w = jnp.concatenate(solved)
    read = [entering] + [w] * len(parts)
    o = dot(jnp.concatenate([q_read, attend], 1), jnp.concatenate(read))
    after = carry * state + dot_narrow(k_written, w)
    yield
    return o, w, after
