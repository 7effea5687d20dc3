"""The one matrix product of the models: every weight multiplication goes through it."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def matmul(x: Float[Array, "... I"], w: Float[Array, "I O"], *, dtype) -> Float[Array, "... O"]:
    """y = x w with operands in `dtype`, float32 accumulation, y in `dtype`."""
    x, w = x.astype(dtype), w.astype(dtype)
    if jax.default_backend() == "cpu":
        # Two-dimensional operands: the weight gradient of a batched product is 1.5x slower there.
        y = jnp.matmul(x.reshape(-1, x.shape[-1]), w, preferred_element_type=jnp.float32)
        return y.reshape(*x.shape[:-1], w.shape[-1]).astype(dtype)
    return jnp.matmul(x, w, preferred_element_type=jnp.float32).astype(dtype)
