"""The data-dependent decay of Mamba-2, Gated DeltaNet and KDA.

arXiv 2405.21060, 2412.06464, 2510.26692.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

SMALLEST_RATE = 1e-3
LARGEST_RATE = 16.0
STEP_RANGE = (1e-3, 1e-1)
STRONGEST_BOUND = -5.0


class DecayRate(nnx.Module):
    """g = -exp(A_log) softplus(x + dt_bias), float32, <= 0: the log decay of each head.

    A ~ U(min_rate, 16); dt_bias is the inverse softplus of a step drawn log-uniformly from
    [1e-3, 1e-1]. With `channels` x and dt_bias have that many a head. With `lower_bound` (in [-5, 0))
    g = lower_bound sigmoid(exp(A_log) (x + dt_bias)) instead, and A = 1.
    """

    def __init__(
        self,
        num_heads: int,
        *,
        channels: int | None = None,
        min_rate: float = SMALLEST_RATE,
        lower_bound: float | None = None,
        rngs: nnx.Rngs,
    ):
        if lower_bound is not None and not STRONGEST_BOUND <= lower_bound < 0:
            raise ValueError(
                f"decay: lower_bound={lower_bound} is a log decay per token; give a number from "
                f"{STRONGEST_BOUND} to below 0, or None for no bound."
            )
        self.lower_bound, self.per_channel = lower_bound, channels is not None
        rate = jax.random.uniform(rngs.params(), (num_heads,), minval=min_rate, maxval=LARGEST_RATE)
        rate_log = jnp.log(rate) if lower_bound is None else jnp.zeros(num_heads)
        self.rate_log = nnx.Param(rate_log, logical=("heads",))
        shape, axes = (num_heads,), ("heads",)
        if channels is not None:
            shape, axes = (num_heads, channels), ("heads", None)
        low, high = (math.log(bound) for bound in STEP_RANGE)
        step = jnp.exp(jax.random.uniform(rngs.params(), shape, minval=low, maxval=high))
        step_bias = step + jnp.log(-jnp.expm1(-step))
        self.step_bias = nnx.Param(step_bias, logical=axes, decay=False)

    def __call__(self, x: Float[Array, "B T H *K"]) -> Float[Array, "B T H *K"]:
        rate = jnp.exp(self.rate_log[...])
        rate = rate[:, None] if self.per_channel else rate
        if self.lower_bound is None:
            return -rate * self.step(x)
        x = x.astype(jnp.float32) + self.step_bias[...]
        return self.lower_bound * jax.nn.sigmoid(rate * x)

    def step(self, x: Float[Array, "B T H *K"]) -> Float[Array, "B T H *K"]:
        """softplus(x + dt_bias), float32, > 0: the step size of Mamba-2."""
        return jax.nn.softplus(x.astype(jnp.float32) + self.step_bias[...])
