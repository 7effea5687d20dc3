"""Rows of tokens as the Pallas TPU kernels of recurrences want them, and back.

Heads lie side by side on the lanes, [B, T, heads * width], with widths filled up to 128 lanes and T to
whole chunks. Numbers per token and head lie in rows along the lanes, [B, N, J, HB, C].
Legend: N chunks of C tokens, J groups of HB value heads (those of one grid step); K and V are the
filled-up widths.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from effarch.kernels import dispatch, platform, varying
from effarch.kernels.chunked import documents, rows, value_pieces

LANES = 128
SHORTEST_CHUNK = 32
LONGEST_CHUNK = 128
WIDEST_HEAD = 256
MOST_SHARED = 16
_STRONGEST_DECAY_LOG = -1000.0  # its exponential is 0, and cumulative sums stay finite
_STRONGEST_CHANNEL_DECAY_LOG = -20.79  # 2^-30, of which `tpu_channel_gates` multiplies up to 3.5


class Plan(NamedTuple):
    """What is known while tracing."""

    chunk: int  # C
    key: int  # K
    value: int  # V
    heads: int  # HB
    group: int  # value heads that read a key head
    per_channel: bool  # whether every key channel has its own decay
    precise: bool
    scale: float
    interpret: bool


DOCUMENT, READ_LOG, WRITE_LOG, CARRY_LOG = range(4)
"""Rows of the array [B,N,8,C] that tells where documents begin (the other rows are 0): the number of the
document of each token, and three logarithms, 0 or -inf: of the entering state read by a token, of a
token written into the leaving state, and, equal in all lanes, of the entering in the leaving state."""


def run(
    chunked: Callable,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    per_head: Sequence[jax.Array],
    g: jax.Array | None,
    *,
    scale: float,
    initial_state: jax.Array | None,
    segment_ids: jax.Array | None,
    chunk_size: int | None,
    interpret: bool,
    precise: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """`chunked(q, k, v, *per_head, g, initial, marks, plan)` on rows: o and the final state.

    Arguments as `rows.run`, which is the judge of all semantics. `chunked` gets q, k [B,T,H*K] and
    v [B,T,HV*V], all bfloat16 or all float32; float32 [B,N,J,HB,C] for `per_head` and g (zeros for
    None; decays per channel [B,T,HV*K]); initial [B,HV,K,V] and marks. It returns o [B,T,HV*V] and the
    final state [B,HV,K,V]. A decay per channel below 2^-30 (1e-9) a token counts as 2^-30.
    """
    _check(q, v, scale, interpret)
    if (pieces := -(-v.shape[3] // WIDEST_HEAD)) > 1:
        whole_width = v.shape[3]
        v, (g, *per_head), initial_state = value_pieces.split(
            v, (g, *per_head), initial_state, pieces
        )
        options = dict(scale=scale, initial_state=initial_state, segment_ids=segment_ids)
        options |= dict(chunk_size=chunk_size, interpret=interpret, precise=precise)
        found = run(chunked, q, k, v, per_head, g, **options)
        return value_pieces.join(*found, pieces, whole_width)
    batch, length, heads, width = q.shape
    value_heads, value_width = v.shape[2:]
    plan = _plan(length, heads, width, value_heads, value_width, chunk_size, q, k, v)
    per_channel = g is not None and g.ndim == 4
    plan = plan._replace(
        per_channel=per_channel, precise=precise, scale=float(scale), interpret=interpret
    )
    if initial_state is None:
        initial_state = jnp.zeros((batch, value_heads, width, value_width), jnp.float32)
    g = jnp.zeros(v.shape[:3], jnp.float32) if g is None else g
    inputs = [q, k, v, g, initial_state, segment_ids, *per_head]
    q, k, v, g, initial_state, segment_ids, *per_head = varying.align(inputs)
    out_dtype, is_real = v.dtype, None
    strongest = _STRONGEST_CHANNEL_DECAY_LOG if per_channel else _STRONGEST_DECAY_LOG
    g = jnp.maximum(g.astype(jnp.float32), strongest)
    if segment_ids is not None:
        is_real = segment_ids != 0
        k, v, g, *per_head = (rows.keep(x, is_real) for x in (k, v, g, *per_head))
    dtype = _operand_dtype(q, k, v)
    o, final = chunked(
        *(_on_lanes(x.astype(dtype), plan.key, plan) for x in (q, k)),
        _on_lanes(v.astype(dtype), plan.value, plan),
        *(_in_rows(x.astype(jnp.float32), plan) for x in per_head),
        _on_lanes(g, plan.key, plan) if per_channel else _in_rows(g, plan),
        _fill_state(initial_state.astype(jnp.float32), plan),
        _marks(q, segment_ids, plan),
        plan,
    )
    o = o.reshape(batch, -1, value_heads, plan.value)[:, :length, :, :value_width]
    o = o if is_real is None else rows.keep(o, is_real)
    return o.astype(out_dtype), final[:, :, :width, :value_width]


def _check(q, v, scale, interpret):
    if not interpret and platform.current() != "tpu":
        raise dispatch.Unsupported(f"it runs on TPUs, and this program is for {platform.current()}")
    if jnp.result_type(q, v).itemsize > 4:
        raise dispatch.Unsupported("float64 inputs are for the xla backend")
    if q.shape[-1] > WIDEST_HEAD:
        raise dispatch.Unsupported(f"heads of {q.shape[-1]} keys are wider than {WIDEST_HEAD}")
    if v.shape[2] // q.shape[2] > MOST_SHARED:
        raise dispatch.Unsupported(f"more than {MOST_SHARED} value heads read one key head")
    if isinstance(scale, jax.core.Tracer):
        raise dispatch.Unsupported("scale is a traced value; it must be a number")


def _operand_dtype(*arrays):
    """bfloat16 if all are, else float32: products of float32 operands are exact to its last digits."""
    return jnp.bfloat16 if all(x.dtype == jnp.bfloat16 for x in arrays) else jnp.float32


def _plan(length, heads, width, value_heads, value_width, chunk_size, *arrays) -> Plan:
    chunk, longest = SHORTEST_CHUNK, min(chunk_size or LONGEST_CHUNK, LONGEST_CHUNK)
    while chunk < longest:
        chunk *= 2
    key, value = (-(-x // LANES) * LANES for x in (width, value_width))
    group = value_heads // heads
    # Many heads hide each other's latency; what they keep in fast memory limits them.
    most_lanes = 2048 if _operand_dtype(*arrays) == jnp.bfloat16 else 512
    fitting = [
        x
        for x in range(group, value_heads + 1, group)
        if value_heads % x == 0 and x * max(key, value) <= most_lanes
    ]
    return Plan(chunk, key, value, max(fitting, default=group), group, False, False, 1.0, False)


def _on_lanes(x, width, plan):
    """[B,T,heads,width] -> [B,N*C,heads * width], filled up with zeros."""
    batch, length, heads, own = x.shape
    if own < width:
        x = jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, width - own)))
    return rows.filled(x.reshape(batch, length, heads * width), plan.chunk, "constant")


def _in_rows(x, plan):
    """[B,T,HV] -> [B,N,J,HB,C]."""
    x = rows.filled(x, plan.chunk, "constant")
    x = x.reshape(x.shape[0], -1, plan.chunk, x.shape[2] // plan.heads, plan.heads)
    return x.transpose(0, 1, 3, 4, 2)


def _fill_state(state, plan):
    behind = [(0, 0), (0, 0), (0, plan.key - state.shape[2]), (0, plan.value - state.shape[3])]
    return jnp.pad(state, behind)


def _marks(q, segment_ids, plan):
    """float32 [B,N,8,C]; see `DOCUMENT`."""
    batch, chunks = q.shape[0], -(-q.shape[1] // plan.chunk)
    if segment_ids is None:
        (marks, _) = varying.align([jnp.zeros((batch, chunks, 8, plan.chunk), jnp.float32), q])
        return marks
    docs = rows.filled(documents.document_index(segment_ids), plan.chunk, "edge")
    docs = docs.reshape(batch, chunks, plan.chunk)
    bounds = documents.boundaries(docs.swapaxes(0, 1))
    seen = [
        bounds.reads,
        bounds.writes,
        jnp.broadcast_to(bounds.carries[..., None], bounds.reads.shape),
    ]
    logs = [jnp.where(x, 0.0, -jnp.inf).swapaxes(0, 1) for x in seen]
    named = jnp.stack([docs.astype(jnp.float32), *logs], axis=2)
    return jnp.pad(named, ((0, 0), (0, 0), (0, 4), (0, 0)))
