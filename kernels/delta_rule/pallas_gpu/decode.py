"""One token of the delta rule on a GPU."""

import jax

from effarch.kernels.chunked import gpu_step


def gated_delta_rule_step(
    state, q, k, v, beta, g, *, scale, interpret=False
) -> tuple[jax.Array, jax.Array]:
    """See `api.gated_delta_rule_step`. `interpret` runs the kernel without a GPU: for tests."""
    o, state = gpu_step.run(state, q, k, v, beta, g, scale=scale, interpret=interpret)
    return o.astype(v.dtype), state
