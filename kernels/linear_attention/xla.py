"""Chunked linear attention in plain JAX: the form for the kind of gate, on rows cut into chunks."""

from effarch.kernels.chunked import rows
from effarch.kernels.linear_attention import channel_gate, scalar_gate, step


def linear_attention(q, k, v, g=None, **options):
    """See `api.linear_attention`; `chunk_size` is rounded up to 16 times a power of two."""
    form = channel_gate if g is not None and g.ndim == 4 else scalar_gate
    return rows.run(form.chunked, q, k, v, (), g, **options)


def linear_attention_step(state, q, k, v, g, *, scale):
    """See `api.linear_attention_step`."""
    o, state = step.linear_step(state, q.astype(state.dtype), k, v, g, scale=scale)
    return o.astype(v.dtype), state
