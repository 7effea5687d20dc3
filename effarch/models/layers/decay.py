"""The data-dependent decay of Mamba-2 and Gated DeltaNet: arXiv 2405.21060, 2412.06464."""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

RATE_RANGE = (1e-3, 16.0)
STEP_RANGE = (1e-3, 1e-1)


class DecayRate(nnx.Module):
    """g = -exp(A_log) softplus(x + dt_bias), float32, <= 0: the log decay of each head.

    A ~ U(1e-3, 16); dt_bias is the inverse softplus of a step drawn log-uniformly from [1e-3, 1e-1].
    """

    def __init__(self, num_heads: int, *, rngs: nnx.Rngs):
        rate = jax.random.uniform(
            rngs.params(), (num_heads,), minval=RATE_RANGE[0], maxval=RATE_RANGE[1]
        )
        low, high = (math.log(bound) for bound in STEP_RANGE)
        step = jnp.exp(jax.random.uniform(rngs.params(), (num_heads,), minval=low, maxval=high))
        self.rate_log = nnx.Param(jnp.log(rate), logical=("heads",))
        self.step_bias = nnx.Param(step + jnp.log(-jnp.expm1(-step)), logical=("heads",))

    def __call__(self, x_BTH: Float[Array, "B T H"]) -> Float[Array, "B T H"]:
        step = jax.nn.softplus(x_BTH.astype(jnp.float32) + self.step_bias[...])
        return -jnp.exp(self.rate_log[...]) * step
