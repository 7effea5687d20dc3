"""Rows of tokens cut into chunks, value heads grouped under the key heads that they read.

Rows of more than LONGEST_STRETCH chunks are cut into stretches that run one after the other, so that
what lies between inputs and outputs stays small (in the cache of a CPU) however long a row is.
Legend: N chunks, B batch, H key heads, R value heads per key head, C tokens of a chunk.
"""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from effarch.kernels import platform, varying
from effarch.kernels.chunked import documents

SHORTEST_CHUNK = 16
LONGEST_STRETCH = 16
"""Chunks."""

# exp(-1000) is 0 in float32 and float64; a bound on the log decay keeps cumulative sums exact.
_STRONGEST_DECAY_LOG = -1000.0


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
) -> tuple[jax.Array, jax.Array]:
    """`chunked(q, k, v, *per_head, g, initial, docs, precision)` on rows: o and the final state.

    q, k [B,T,H,K]; v [B,T,HV,V]; `per_head` arrays [B,T,HV]; g None, [B,T,HV] or [B,T,HV,K].
    `chunked` gets q and k [N,B,H,C,K], arrays of value heads [N,B,H,R,C,...], initial [B,H,R,K,V] and
    document numbers [N,B,C], and returns o [N,B,H,R,C,V] and the final state. `chunk_size` is rounded
    up to 16 times a power of two.
    """
    dtype = jnp.result_type(jnp.float32, q, k, v, *per_head)
    if initial_state is None:
        shape = (q.shape[0], v.shape[2], q.shape[3], v.shape[3])
        initial_state = jnp.zeros(shape, dtype)
    inputs = [q, k, v, g, initial_state, segment_ids, *per_head]
    q, k, v, g, initial_state, segment_ids, *per_head = varying.align(inputs)
    docs = None if segment_ids is None else documents.document_index(segment_ids)

    length = q.shape[1]
    chunk = chunk_length(length, chunk_size, g is not None and g.ndim == 4)
    step = functools.partial(_stretch, chunked, scale, chunk)
    stretches = -(-length // (chunk * LONGEST_STRETCH))
    tokens = (q, k, v, per_head, g, segment_ids, docs)
    if stretches == 1:
        final, o = step(initial_state.astype(dtype), tokens)
        return o, final
    by_stretch = functools.partial(_by_stretch, stretches=stretches, multiple=chunk)
    if docs is not None:
        docs = by_stretch(docs, mode="edge")
        # The document that a state comes from counts as number 0.
        before = jnp.concatenate([jnp.zeros_like(docs[:1, :, -1]), docs[:-1, :, -1]])
        docs = docs - before[..., None]
    tokens = (*jax.tree.map(by_stretch, tokens[:-1]), docs)
    final, o = jax.lax.scan(step, initial_state.astype(dtype), tokens)
    return jnp.moveaxis(o, 0, 1).reshape(o.shape[1], -1, *o.shape[3:])[:, :length], final


def _stretch(chunked, scale, chunk, initial, tokens):
    """The state after some tokens and their outputs; everything is cut and cast in here."""
    q, k, v, per_head, g, segment_ids, docs = tokens
    # Products of bfloat16 inputs may take the device's fast float32 form.
    is_narrow = jnp.result_type(q, k, v).itemsize < 4
    precision = jax.lax.Precision.DEFAULT if is_narrow else jax.lax.Precision.HIGHEST
    batch, length, heads, width = q.shape
    group, out_dtype = v.shape[2] // heads, v.dtype
    q, k, v, *per_head = (x.astype(initial.dtype) for x in (q, k, v, *per_head))
    if g is not None:
        g = jnp.maximum(g.astype(initial.dtype), _STRONGEST_DECAY_LOG)
    if segment_ids is not None:
        is_real = segment_ids != 0
        k, v, g, *per_head = (keep(x, is_real) for x in (k, v, g, *per_head))
    cut = functools.partial(_cut, chunk=chunk)

    def by_value_head(x):
        return cut(x.reshape(batch, length, heads, group, *x.shape[3:]), head_axes=2)

    o, final = chunked(
        *(cut(q * scale, head_axes=1), cut(k, head_axes=1), by_value_head(v)),
        *(by_value_head(x) for x in per_head),
        None if g is None else by_value_head(g),
        initial.reshape(batch, heads, group, width, -1),
        None if docs is None else cut(docs, head_axes=0, mode="edge"),
        precision,
    )
    o = jnp.moveaxis(o, (0, 1, 4), (1, 0, 2)).reshape(batch, -1, *v.shape[2:])[:, :length]
    o = o if segment_ids is None else keep(o, is_real)
    return final.reshape(initial.shape), o.astype(out_dtype)


def sum_value_heads(x: jax.Array) -> jax.Array:
    """[N,B,H,R,...] -> [N,B,H,...], as additions of slices.

    XLA:CPU of jaxlib 0.10 crashes in a fused sum of products over an inner axis of seven (one of
    them of size 1), which is what a sum here would become under `jax.vmap`.
    """
    return functools.reduce(jnp.add, [x[:, :, :, head] for head in range(x.shape[3])])


def chunk_length(length: int, chunk_size: int | None, per_channel: bool) -> int:
    """Tokens of a chunk: `chunk_size`, by default what is fast here, or less for short rows."""
    if chunk_size is None:
        chunk_size = 128 if platform.current() == "tpu" else 64
        if per_channel and platform.current() == "cpu":
            chunk_size = 32  # measured: 0.5 to 0.6 of the time of 64, with gradient
    chunk = SHORTEST_CHUNK
    while chunk < min(length, chunk_size):
        chunk *= 2
    return chunk


def keep(x: jax.Array | None, is_real: jax.Array) -> jax.Array | None:
    """Zeros at padding: such a token reads and writes nothing and decays nothing."""
    if x is None:
        return None
    return jnp.where(is_real.reshape(*is_real.shape, *(1,) * (x.ndim - 2)), x, 0)


def _cut(x: jax.Array, *, chunk: int, head_axes: int, mode: str = "constant") -> jax.Array:
    """[B,T,*heads,*rest] -> [N,B,*heads,C,*rest], the last chunk filled up with zeros or its edge."""
    batch = x.shape[0]
    x = filled(x, chunk, mode)
    x = x.reshape(batch, -1, chunk, *x.shape[2:])
    return jnp.moveaxis(x, (1, 0, 2), (0, 1, 2 + head_axes))


def _by_stretch(
    x: jax.Array, *, stretches: int, multiple: int, mode: str = "constant"
) -> jax.Array:
    """[B,T,...] -> [stretches,B,T / stretches,...], filled up to a multiple of tokens each."""
    x = filled(x, stretches * multiple, mode)
    x = x.reshape(x.shape[0], stretches, -1, *x.shape[2:])
    return jnp.moveaxis(x, 1, 0)


def filled(x: jax.Array, multiple: int, mode: str) -> jax.Array:
    behind = -x.shape[1] % multiple
    return jnp.pad(x, [(0, 0), (0, behind)] + [(0, 0)] * (x.ndim - 2), mode=mode) if behind else x
