"""One token of the delta rule on a TPU."""

import jax

from effarch.kernels.chunked import tpu_step


def gated_delta_rule_step(
    state, q, k, v, beta, g, *, scale, interpret=False
) -> tuple[jax.Array, jax.Array]:
    """See `api.gated_delta_rule_step`. `interpret` runs the kernel without a TPU: for tests."""
    o, state = tpu_step.run(state, q, k, v, beta, g, scale=scale, interpret=interpret)
    return o.astype(v.dtype), state
