"""Rows of tokens as the GPU kernels want them: checks, whole chunks, and the decays as factors.

Heads stay where the projection puts them, [B,T,H,K]: a block of 64 tokens of a head is read by strides,
nothing is moved. T is filled up to whole chunks, widths to powers of two.
Legend: N chunks of C tokens; H key heads; HV value heads.
"""

import re
from typing import NamedTuple

import jax
import jax.numpy as jnp

from effarch.kernels import dispatch, platform, varying
from effarch.kernels.chunked import documents, rows

LONGEST_CHUNK = 64
NARROWEST_HEAD = 16
WIDEST_HEAD = 128
_STRONGEST_DECAY_LOG = -1000.0  # its exponential is 0, and cumulative sums stay finite
_LOG2_E = 1.4426950408889634


class Plan(NamedTuple):
    """What is known while tracing."""

    chunk: int  # C
    key: int  # K
    value: int  # V
    value_heads: int  # HV
    group: int  # value heads that read a key head
    gate: str  # "none", "head" or "channel"
    scale: float
    columns: int  # of a matrix that are treated at once where registers are short
    interpret: bool

    @property
    def per_channel(self) -> bool:
        return self.gate == "channel"


class Factors(NamedTuple):
    """The decays of all chunks; a document's end turns each of them to 0. All float32.

    `coarse` + `fine` are the decays in powers of two, summed from the start of the chunk; sums of coarse
    (multiples of 1/64) are exact, so that differences stay accurate after strong decays.
    """

    coarse: jax.Array | None  # [B,HV,T], per channel [B,T,HV,K]; None: no decay
    fine: jax.Array | None
    read: jax.Array  # [B,HV,T], per channel [B,T,HV,K]: from the entering state to token i
    write: jax.Array  # as read: from token j to the end of the chunk
    carry: jax.Array  # [B,HV,N,1], per channel [B,HV,N,K]: from the entering to the leaving state
    docs: jax.Array | None  # int32 [B,T], the number of the document of each token


def run(
    chunked,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    beta: jax.Array,
    g: jax.Array | None,
    *,
    scale: float,
    initial_state: jax.Array | None,
    segment_ids: jax.Array | None,
    chunk_size: int | None,
    interpret: bool,
) -> tuple[jax.Array, jax.Array]:
    """`chunked(q, k, v, beta, g, initial, docs, plan)` on rows: o and the final state.

    Arguments as `chunked.rows.run`, which is the judge of all semantics. `chunked` gets q, k [B,T,H,K]
    and v [B,T,HV,V], all bfloat16 or all float32; beta [B,HV,T] and g [B,HV,T] or [B,T,HV,K], float32.
    """
    _check(q, k, v, scale, interpret)
    if v.shape[-1] > WIDEST_HEAD:
        options = dict(scale=scale, segment_ids=segment_ids, chunk_size=chunk_size)
        return _in_pieces(chunked, q, k, v, beta, g, initial_state, interpret=interpret, **options)
    batch, length, heads, width = q.shape
    value_heads, value_width = v.shape[2:]
    plan = Plan(
        chunk=_chunk_length(chunk_size),
        key=_filled_width(width),
        value=_filled_width(value_width),
        value_heads=value_heads,
        group=value_heads // heads,
        gate="none" if g is None else "channel" if g.ndim == 4 else "head",
        scale=float(scale),
        columns=128 if _multiplies_from_shared_memory() else 64,
        interpret=interpret,
    )
    if initial_state is None:
        initial_state = jnp.zeros((batch, value_heads, width, value_width), jnp.float32)
    inputs = [q, k, v, beta, g, initial_state, segment_ids]
    q, k, v, beta, g, initial_state, segment_ids = varying.align(inputs)
    out_dtype, is_real, docs = v.dtype, None, None
    if g is not None:
        g = jnp.maximum(g.astype(jnp.float32), _STRONGEST_DECAY_LOG)
    if segment_ids is not None:
        is_real = segment_ids != 0
        k, v, beta, g = (rows.keep(x, is_real) for x in (k, v, beta, g))
        docs = rows.filled(documents.document_index(segment_ids), plan.chunk, "edge")
    dtype = _operand_dtype(q, k, v)
    behind = [(0, 0), (0, 0), (0, plan.key - width), (0, plan.value - value_width)]
    o, final = chunked(
        *(_filled(x.astype(dtype), plan.key, plan) for x in (q, k)),
        _filled(v.astype(dtype), plan.value, plan),
        _by_head(beta.astype(jnp.float32), plan),
        None if g is None else _filled(g, plan.key, plan) if g.ndim == 4 else _by_head(g, plan),
        jnp.pad(initial_state.astype(jnp.float32), behind),
        docs,
        plan,
    )
    o = o[:, :length, :, :value_width]
    o = o if is_real is None else rows.keep(o, is_real)
    return o.astype(out_dtype), final[:, :, :width, :value_width]


def _in_pieces(chunked, q, k, v, beta, g, initial, **options):
    """`run` where values are wider than the kernels': their channels never meet, so that a head becomes
    several that read one key head."""
    *_, heads, width = v.shape
    pieces = -(-width // WIDEST_HEAD)
    own = -(-width // pieces)

    def cut(x):  # [..., width] -> [..., pieces, own]
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, pieces * own - width)])
        return x.reshape(*x.shape[:-1], pieces, own)

    def of_each(x):
        return None if x is None else jnp.repeat(x, pieces, axis=2)

    if initial is not None:
        initial = cut(initial).swapaxes(2, 3).reshape(len(v), heads * pieces, -1, own)
    o, final = run(
        *(chunked, q, k, cut(v).reshape(*v.shape[:2], heads * pieces, own)),
        *(of_each(beta), of_each(g)),
        initial_state=initial,
        **options,
    )
    o = o.reshape(*o.shape[:2], heads, -1)[..., :width]
    final = final.reshape(len(v), heads, pieces, -1, own).swapaxes(2, 3)
    return o, final.reshape(*final.shape[:3], -1)[..., :width]


def factors(g: jax.Array | None, docs: jax.Array | None, like: jax.Array, plan: Plan) -> Factors:
    """Masks go in before the exponential, so nothing overflows. `like`: beta [B,HV,T]."""
    time = 1 if plan.per_channel else 2
    coarse, fine = (None, None) if g is None else _summed(g * _LOG2_E, time, plan)
    logs = [jnp.zeros_like(like)] * 2
    if g is not None:
        chunks = [_cut(x, time, plan) for x in (coarse, fine)]
        last = [jax.lax.slice_in_dim(x, plan.chunk - 1, plan.chunk, axis=time + 1) for x in chunks]
        to_end = sum(end - x for end, x in zip(last, chunks))
        logs = [coarse + fine, to_end.reshape(coarse.shape)]
    read_log, write_log = logs
    if docs is not None:
        bounds = documents.boundaries(_cut(docs, 1, plan).swapaxes(0, 1))
        reads, writes = (
            x.swapaxes(0, 1).reshape(docs.shape) for x in (bounds.reads, bounds.writes)
        )
        axes = (slice(None), slice(None), None, None) if plan.per_channel else (slice(None), None)
        read_log = jnp.where(reads[axes], read_log, -jnp.inf)
        write_log = jnp.where(writes[axes], write_log, -jnp.inf)
    read, write = jnp.exp2(read_log), jnp.exp2(write_log)
    carry = jax.lax.index_in_dim(_cut(read, time, plan), plan.chunk - 1, time + 1, keepdims=False)
    carry = carry.transpose(0, 2, 1, 3) if plan.per_channel else carry[..., None]
    return Factors(coarse, fine, read, write, carry, docs)


def gate_gradient(d_log, d_write_log, d_carry_log, plan: Plan) -> jax.Array:
    """d g from what flows to the logarithms of factors.

    `d_log` ends at its token (all gates up to it), `d_write_log` starts after it (all later gates of the
    chunk), both [B,HV,T] or [B,T,HV,K]; `d_carry_log`, as `Factors.carry`, flows to all gates.
    """
    time = 1 if plan.per_channel else 2
    upper = jnp.triu(jnp.ones((plan.chunk, plan.chunk), jnp.float32))
    strict = jnp.tril(jnp.ones((plan.chunk, plan.chunk), jnp.float32), -1)
    axes = "ts,bnshk->bnthk" if plan.per_channel else "ts,bhns->bhnt"
    highest = jax.lax.Precision.HIGHEST
    total = jnp.einsum(axes, upper, _cut(d_log, time, plan), precision=highest)
    total += jnp.einsum(axes, strict, _cut(d_write_log, time, plan), precision=highest)
    total += d_carry_log.swapaxes(1, 2)[:, :, None] if plan.per_channel else d_carry_log
    return total.reshape(d_log.shape)


def _summed(g, time, plan):
    coarse = jnp.round(g * 64) / 64
    parts = (coarse, g - coarse)
    return [jnp.cumsum(_cut(x, time, plan), axis=time + 1).reshape(g.shape) for x in parts]


def _cut(x, time, plan):
    """[..., T, ...] -> [..., N, C, ...]."""
    return x.reshape(*x.shape[:time], -1, plan.chunk, *x.shape[time + 1 :])


def _check(q, k, v, scale, interpret):
    if not interpret and platform.current() != "gpu":
        raise dispatch.Unsupported(f"it runs on GPUs, and this program is for {platform.current()}")
    if jnp.result_type(q, v).itemsize > 4:
        raise dispatch.Unsupported("float64 inputs are for the xla backend")
    if not interpret and _operand_dtype(q, k, v) != jnp.bfloat16:
        raise dispatch.Unsupported(
            "q, k and v must be bfloat16: float32 products would leave the matrix unit"
        )
    if q.shape[-1] > WIDEST_HEAD:
        raise dispatch.Unsupported(f"heads of {q.shape[-1]} keys are wider than {WIDEST_HEAD}")
    if isinstance(scale, jax.core.Tracer):
        raise dispatch.Unsupported("scale is a traced value; it must be a number")


def _multiplies_from_shared_memory() -> bool:
    """Hopper (wgmma) and Blackwell (tcgen05) of data centers; others keep operands in registers."""
    device = jax.sharding.get_abstract_mesh().abstract_device or jax.devices()[0]
    return re.search(r"\bG?[HB]\d+", device.device_kind) is not None  # H100, GH200, B200, ...


def _operand_dtype(*arrays):
    return jnp.bfloat16 if all(x.dtype == jnp.bfloat16 for x in arrays) else jnp.float32


def _chunk_length(chunk_size) -> int:
    longest = min(chunk_size or LONGEST_CHUNK, LONGEST_CHUNK)
    chunk = rows.SHORTEST_CHUNK
    while chunk < longest:
        chunk *= 2
    return chunk


def _filled_width(width: int) -> int:
    filled = NARROWEST_HEAD
    while filled < width:
        filled *= 2
    return filled


def _filled(x, width, plan):
    """[B,T,heads,width], both filled up with zeros."""
    x = jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, width - x.shape[-1]))) if x.shape[-1] < width else x
    return rows.filled(x, plan.chunk, "constant")


def _by_head(x, plan):
    """[B,T,HV] -> [B,HV,T]."""
    return rows.filled(x, plan.chunk, "constant").swapaxes(1, 2)
