"""The one matrix product of the models: every weight multiplication goes through it."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from effarch.kernels import platform
from effarch.quantization import estimators, products
from effarch.quantization.recipes import Recipe


def matmul(x: Float[Array, "... I"], w: Float[Array, "I O"], *, dtype) -> Float[Array, "... O"]:
    """y = x w with operands in `dtype`, float32 accumulation, y in `dtype`."""
    x, w = x.astype(dtype), w.astype(dtype)
    if platform.current() == "cpu":
        # Two-dimensional operands: the weight gradient of a batched product is 1.5x slower there.
        y = jnp.matmul(x.reshape(-1, x.shape[-1]), w, preferred_element_type=jnp.float32)
        return y.reshape(*x.shape[:-1], w.shape[-1]).astype(dtype)
    return jnp.matmul(x, w, preferred_element_type=jnp.float32).astype(dtype)


def quantized_matmul(
    x: Float[Array, "... I"],
    w: Float[Array, "I O"],
    recipe: Recipe,
    *,
    dtype,
    seed: jax.Array | None = None,
    amax: Float[Array, "3"] | None = None,
    probe: Float[Array, "3"] | None = None,
    steps: Float[Array, "2"] | None = None,
) -> Float[Array, "... O"]:
    """y = x w by a recipe: its estimators on x and w, then its three products.

    seed, amax and probe are those of `products.multiply`; `steps` are the learned step sizes of x and
    w. Blocks along the tokens run over the batch as one list: when the gradient is taken, their number
    must be a multiple of the recipe's block.
    """
    x_TI = x.reshape(-1, x.shape[-1])
    x_TI = _estimated(x_TI, recipe.x, 1, recipe.step_bits[0], steps, 0)
    w = _estimated(w, recipe.w, 0, recipe.step_bits[1], steps, 1)
    y = products.multiply(recipe.products, x_TI, w, dtype=dtype, seed=seed, amax=amax, probe=probe)
    return y.reshape(*x.shape[:-1], w.shape[-1])


def _estimated(array, rule, axis, bits, steps, index):
    if rule is not None:
        array = estimators.estimate(array, rule, axis)
    return estimators.learned_step(array, steps[index], bits) if bits else array
