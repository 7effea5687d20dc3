"""The one matrix product of the models: every weight multiplication goes through it."""

import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from effarch.kernels import platform, varying
from effarch.quantization import estimators, products
from effarch.quantization.recipes import Recipe


def matmul(x: Float[Array, "... I"], w: Float[Array, "I O"], *, dtype) -> Float[Array, "... O"]:
    """y = x w with operands in `dtype`, float32 accumulation, y in `dtype`.

    The gradients take operands of `dtype` as well; that of w is float32 before it takes w's type.
    """
    return _product(*varying.align([x.astype(dtype), w]), jnp.dtype(dtype))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _product(x, w, dtype):
    return _dot(x, w.astype(dtype)).astype(dtype)


def _product_fwd(x, w, dtype):
    return _product(x, w, dtype), (x, w)


def _product_bwd(dtype, saved, g):
    # Autodiff would multiply the float32 cotangent of the cast: a float32 product on every device.
    x, w = saved
    return _dot(g, w.astype(dtype), 1).astype(dtype), _contract_rows(x, g).astype(w.dtype)


_product.defvjp(_product_fwd, _product_bwd)


def _dot(x: jax.Array, w: jax.Array, axis: int = 0) -> jax.Array:
    """The last axis of x times axis `axis` of w, in float32."""
    rows = x.reshape(-1, x.shape[-1]) if platform.current() == "cpu" else x
    dims = (((rows.ndim - 1,), (axis,)), ((), ()))
    y = jax.lax.dot_general(rows, w, dims, preferred_element_type=jnp.float32)
    return y.reshape(*x.shape[:-1], w.shape[1 - axis])


def _contract_rows(x: jax.Array, g: jax.Array) -> jax.Array:
    """x^T g [I,O] in float32, summed over all other axes.

    On CPUs the fast form differs: two axes of rows for bfloat16 (of a single one XLA makes a float32
    product), one for float32 (two take up to 1.5 times as long).
    """
    if platform.current() == "cpu":
        lead = (-1,) if x.dtype == jnp.float32 else _two_axes(math.prod(x.shape[:-1]))
        x, g = x.reshape(*lead, x.shape[-1]), g.reshape(*lead, g.shape[-1])
    axes = tuple(range(x.ndim - 1))
    return jax.lax.dot_general(x, g, ((axes, axes), ((), ())), preferred_element_type=jnp.float32)


def _two_axes(num_rows: int) -> tuple[int, int]:
    return next((n, num_rows // n) for n in (4, 2, 1) if num_rows % n == 0)


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
    cuts: products.Cuts = products.WHOLE,
) -> Float[Array, "... O"]:
    """y = x w by a recipe: its estimators on x and w, then its three products.

    seed, amax, probe and cuts are those of `products.multiply`; the seed serves stochastic rules of
    the forward pass as well. `steps` are the learned step sizes of x and w. Blocks along the tokens run
    over the batch as one list: when the gradient is taken, their number must be a multiple of the
    recipe's block.
    """
    x_TI = x.reshape(-1, x.shape[-1])
    seed_x, seed_w = recipe.forward_words(seed)
    x_TI = _estimated(x_TI, recipe.x, 1, recipe.step_bits[0], steps, 0, cuts.x, seed_x)
    w = _estimated(w, recipe.w, 0, recipe.step_bits[1], steps, 1, cuts.w, seed_w)
    given = dict(dtype=dtype, seed=seed, amax=amax, probe=probe, cuts=cuts)
    y = products.multiply(recipe.products, x_TI, w, **given)
    return y.reshape(*x.shape[:-1], w.shape[-1])


def _estimated(array, rule, axis, bits, steps, index, cut, seed):
    if rule is not None:
        array = estimators.estimate(array, rule, axis, cut, seed)
    return estimators.learned_step(array, steps[index], bits) if bits else array
