"""Chunked delta rule in plain JAX: the form for the kind of gate, on rows cut into chunks."""

from effarch.kernels.chunked import rows
from effarch.kernels.delta_rule import channel_gate, scalar_gate, step


def gated_delta_rule(q, k, v, beta, g=None, **options):
    """See `api.gated_delta_rule`; `chunk_size` is rounded up to 16 times a power of two."""
    form = channel_gate if g is not None and g.ndim == 4 else scalar_gate
    return rows.run(form.chunked, q, k, v, (beta,), g, **options)


def gated_delta_rule_step(state, q, k, v, beta, g, *, scale):
    """See `api.gated_delta_rule_step`."""
    o, state = step.delta_step(state, q.astype(state.dtype), k, v, beta, g, scale)
    return o.astype(v.dtype), state
