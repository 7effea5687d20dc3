"""The forget gate of HGRN and HGRN2: arXiv 2311.04823, 2404.07904."""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

SMALLEST_BOUND = 1e-3
"""What the first layer starts from: its bound is 0 in the papers, and not learned."""


class ForgetGate(nnx.Module):
    """a = b + (1 - b) sigmoid(x), returned as log a in float32; b learned per channel, or 0.

    D parameters if bounded. The papers tie the bounds of all layers in one table, so that they never
    fall with depth. Here each layer learns its own, from a start value or, with `by_depth`, from
    theirs: l / L in layer l of L.
    """

    def __init__(self, width: int, *, lower_bound: float | None = None, by_depth: bool = False):
        """`lower_bound`: the start value of b, above 0 and below 1; None for b = 0."""
        if lower_bound is not None and not 0 < lower_bound < 1:
            raise ValueError(
                f"forget gate: lower_bound={lower_bound} must lie between 0 and 1, or be None."
            )
        if lower_bound is not None and by_depth:
            raise ValueError(
                f"forget gate: lower_bound={lower_bound} and bound_by_depth give two starts; "
                "leave one out."
            )
        self.is_bounded = lower_bound is not None or by_depth
        if self.is_bounded:
            start = jnp.full((width,), _logit(lower_bound or 0.0))
            where = dict(start_at_depth=_logit) if by_depth else {}
            self.bound = nnx.Param(start, logical=("heads",), **where)

    def __call__(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        log_gate = jax.nn.log_sigmoid(x_BTD.astype(jnp.float32))
        if not self.is_bounded:
            return log_gate
        bound = self.bound[...]
        free = jax.nn.log_sigmoid(-bound) + log_gate
        return jnp.logaddexp(jax.nn.log_sigmoid(bound), free)


def _logit(bound: float) -> float:
    bound = max(bound, SMALLEST_BOUND)
    return math.log(bound / (1 - bound))
