"""Activations by name, and PolyReLU and PolyNorm, which learn: Polynomial Composition, arXiv 2411.03884.

    PolyReLU(x) = a3 relu(x)^3 + a2 relu(x)^2 + a1 relu(x) + a0
    PolyNorm(x) = a3 N(x^3) + a2 N(x^2) + a1 N(x) + a0,      N(v) = v / sqrt(mean(v^2) + 1e-6)

The paper writes N with the L2 norm; its code has the root mean square, as here. The mean is over the
whole width of the feed-forward even if a mesh splits it (their code normalizes each device's part).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from effarch import names

FUNCTIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
    "sigmoid": jax.nn.sigmoid,
}
_EPS = 1e-6


class Polynomial(nnx.Module):
    """a3 p3 + a2 p2 + a1 p1 + a0 of powers p of the input.  4 parameters, without weight decay."""

    def __init__(self, *, is_normed: bool, param_dtype=jnp.float32):
        """`is_normed`: PolyNorm, else PolyReLU. `coefficients` are a3, a2, a1, a0."""
        start = jnp.asarray([1 / 3, 1 / 3, 1 / 3, 0.0], param_dtype)
        self.coefficients = nnx.Param(start, logical=(None,))
        self.is_normed = is_normed

    def __call__(self, x: Float[Array, "... F"]) -> Float[Array, "... F"]:
        """Powers and means in float32; of its own, the backward pass keeps x alone."""
        return jax.checkpoint(self._apply)(x, self.coefficients[...])

    def _apply(self, x, coefficients):
        wide = x.astype(jnp.float32)
        wide = wide if self.is_normed else jax.nn.relu(wide)
        total, power = coefficients[3], 1.0
        for coefficient in (coefficients[2], coefficients[1], coefficients[0]):
            power = power * wide
            total = total + coefficient * (_normed(power) if self.is_normed else power)
        return total.astype(x.dtype)


def _normed(v: Float[Array, "... F"]) -> Float[Array, "... F"]:
    return v * jax.lax.rsqrt(jnp.mean(v * v, axis=-1, keepdims=True) + _EPS)


def make(name: str, field: str, *, param_dtype=jnp.float32) -> Callable[[Array], Array]:
    """The activation of that name: a function, or a module with parameters of its own."""
    polynomials = {"poly_relu": False, "poly_norm": True}
    if name in polynomials:
        return Polynomial(is_normed=polynomials[name], param_dtype=param_dtype)
    return names.lookup(FUNCTIONS | dict.fromkeys(polynomials), name, field)
