"""The forget gate of HGRN and HGRN2: arXiv 2311.04823, 2404.07904."""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float


class ForgetGate(nnx.Module):
    """a = b + (1 - b) sigmoid(x), returned as log a in float32; b learned per channel, or 0.

    D parameters if bounded. The papers tie the bounds of all layers in one table, so that they grow
    with depth (0 in the first layer, l / L in layer l); here each layer learns its own from the start
    value it is given, because a mixer knows nothing of the other layers.
    """

    def __init__(self, width: int, *, lower_bound: float | None = None):
        """`lower_bound`: the start value of b, above 0 and below 1; None for b = 0."""
        if lower_bound is not None and not 0 < lower_bound < 1:
            raise ValueError(
                f"forget gate: lower_bound={lower_bound} must lie between 0 and 1, or be None."
            )
        self.is_bounded = lower_bound is not None
        if self.is_bounded:
            logit = math.log(lower_bound / (1 - lower_bound))
            self.bound = nnx.Param(jnp.full((width,), logit), logical=("heads",))

    def __call__(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        log_gate = jax.nn.log_sigmoid(x_BTD.astype(jnp.float32))
        if not self.is_bounded:
            return log_gate
        bound = self.bound[...]
        free = jax.nn.log_sigmoid(-bound) + log_gate
        return jnp.logaddexp(jax.nn.log_sigmoid(bound), free)
