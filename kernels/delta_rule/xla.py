"""Chunked delta rule in plain JAX: cuts rows into chunks and picks the form for the kind of gate."""

import jax
import jax.numpy as jnp

from effarch.kernels import varying
from effarch.kernels.delta_rule import channel_gate, documents, scalar_gate, triangular

# exp(-1000) is 0 in float32 and float64; a bound on the log decay keeps cumulative sums exact.
_STRONGEST_DECAY_LOG = -1000.0


def gated_delta_rule(
    q, k, v, beta, g=None, *, scale, initial_state=None, segment_ids=None, chunk_size=None
):
    """See `api.gated_delta_rule`; `chunk_size` is rounded up to 16 times a power of two."""
    dtype = jnp.result_type(jnp.float32, q, k, v, beta)
    # Products of bfloat16 inputs may take the device's fast float32 form; L and its inverse never.
    is_narrow = jnp.result_type(q, k, v).itemsize < 4
    precision = jax.lax.Precision.DEFAULT if is_narrow else jax.lax.Precision.HIGHEST
    batch, length, heads, width = q.shape
    group = v.shape[2] // heads
    if initial_state is None:
        initial_state = jnp.zeros((batch, v.shape[2], width, v.shape[3]), dtype)
    out_dtype = v.dtype
    q, k, v, beta, g, initial_state, segment_ids = varying.align(
        [q, k, v, beta, g, initial_state, segment_ids]
    )
    q, k, v, beta, initial_state = (x.astype(dtype) for x in (q, k, v, beta, initial_state))
    if g is not None:
        g = jnp.maximum(g.astype(dtype), _STRONGEST_DECAY_LOG)
    is_real, docs = None, None
    if segment_ids is not None:
        is_real, docs = segment_ids != 0, documents.document_index(segment_ids)
        k, v, beta, g = (_keep(x, is_real) for x in (k, v, beta, g))

    chunk = _chunk_length(length, chunk_size)

    def by_value_head(x):
        return _cut(x.reshape(batch, length, heads, group, *x.shape[3:]), chunk, head_axes=2)

    chunked = channel_gate.chunked if g is not None and g.ndim == 4 else scalar_gate.chunked
    o, final = chunked(
        _cut(q * scale, chunk, head_axes=1),
        _cut(k, chunk, head_axes=1),
        by_value_head(v),
        by_value_head(beta),
        None if g is None else by_value_head(g),
        initial_state.reshape(batch, heads, group, width, -1),
        None if docs is None else _cut(docs, chunk, head_axes=0, mode="edge"),
        precision,
    )
    o = jnp.moveaxis(o, (0, 1, 4), (1, 0, 2)).reshape(batch, -1, *v.shape[2:])[:, :length]
    o = o if is_real is None else _keep(o, is_real)
    return o.astype(out_dtype), final.reshape(initial_state.shape)


def _chunk_length(length: int, chunk_size: int | None) -> int:
    if chunk_size is None:
        chunk_size = 128 if jax.default_backend() == "tpu" else 64
    chunk = triangular.BLOCK
    while chunk < min(length, chunk_size):
        chunk *= 2
    return chunk


def _keep(x: jax.Array | None, is_real: jax.Array) -> jax.Array | None:
    """Zeros at padding: such a token reads and writes nothing and decays nothing."""
    if x is None:
        return None
    return jnp.where(is_real.reshape(*is_real.shape, *(1,) * (x.ndim - 2)), x, 0)


def _cut(x: jax.Array, chunk: int, head_axes: int, mode: str = "constant") -> jax.Array:
    """[B,T,*heads,*rest] -> [N,B,*heads,C,*rest], the last chunk filled up with zeros or its edge."""
    batch, length = x.shape[:2]
    x = jnp.pad(x, [(0, 0), (0, -length % chunk)] + [(0, 0)] * (x.ndim - 2), mode=mode)
    x = x.reshape(batch, -1, chunk, *x.shape[2:])
    return jnp.moveaxis(x, (1, 0, 2), (0, 1, 2 + head_axes))
