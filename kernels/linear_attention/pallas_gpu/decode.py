"""One token of linear attention on a GPU."""

import jax

from effarch.kernels.chunked import gpu_step


def linear_attention_step(
    state, q, k, v, g, *, scale, interpret=False
) -> tuple[jax.Array, jax.Array]:
    """See `api.linear_attention_step`. `interpret` runs the kernel without a GPU: for tests."""
    o, state = gpu_step.run(state, q, k, v, None, g, scale=scale, interpret=interpret)
    return o.astype(v.dtype), state
