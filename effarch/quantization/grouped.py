"""The product of experts by a recipe: rows grouped by expert, each group times a matrix of its own.

Blocks and scales never cross an expert: those of x, e and w along the contraction lie within a row or
a matrix, and a scale "of the tensor" is one of each row of x and e and of each expert's matrix. The
weight gradient contracts the rows of a group, whose number varies: it is not rounded.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from effarch.kernels.grouped_matmul import api as grouped_matmul
from effarch.kernels.quantize import api as quantize
from effarch.quantization import estimators, products
from effarch.quantization.recipes import Recipe


def quantized_grouped_matmul(
    x: Float[Array, "M D"],
    w: Float[Array, "E D F"],
    group_sizes: Int[Array, " E"],
    recipe: Recipe,
    *,
    seed: jax.Array | None = None,
    **options,
) -> Float[Array, "M F"]:
    """`kernels.grouped_matmul` by a recipe; `options` are that function's.

    seed: as in `products.multiply`. Raises ValueError for a recipe that keeps state (delayed scales,
    learned steps): an expert may see no token for long.
    """
    if recipe.has_state:
        raise ValueError(
            "quantization: recipes with delayed scales or learned steps do not serve experts; choose "
            "another recipe for them, such as fp8_current or mxfp8."
        )
    dtype = x.dtype
    seed_x, seed_w = recipe.forward_words(seed)
    if recipe.x is not None:
        x = estimators.estimate(x, recipe.x, 1, seed=seed_x)
    if recipe.w is not None:
        w = estimators.estimate(w, recipe.w, 1, seed=seed_w)
    static = (recipe.products, dtype, tuple(sorted(options.items())))
    return _multiply(static, x, w, group_sizes, seed)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _multiply(static, x, w, group_sizes, seed):
    recipe, dtype, options = static
    x = _rounded(recipe.y_x, x, 1, dtype)
    return _product(x, _rounded(recipe.y_w, w, 1, dtype), group_sizes, options)


def _forward(static, x, w, group_sizes, seed):
    return _multiply(static, x, w, group_sizes, seed), (x, w, group_sizes, seed)


def _backward(static, saved, e):
    recipe, dtype, options = static
    x, w, group_sizes, seed = saved
    # Only the rounding of dx is drawn.
    recipe = dataclasses.replace(recipe, dw_x=None, dw_e=None)
    seeds, signs = products.draws(recipe, seed)
    e_rounded = _rounded(recipe.dx_e, e, 1, dtype, seeds.get("dx_e"), signs)
    w_rounded = _rounded(recipe.dx_w, w, 2, dtype, seeds.get("dx_w"), signs)
    dx = _product(e_rounded, jnp.swapaxes(w_rounded, 1, 2), group_sizes, options)

    def exact(w):
        return _product(x.astype(dtype), w.astype(dtype), group_sizes, options)

    (dw,) = jax.vjp(exact, w)[1](e.astype(dtype))
    return dx.astype(x.dtype), dw, None, None


_multiply.defvjp(_forward, _backward)


def _product(x, w, group_sizes, options):
    return grouped_matmul.grouped_matmul(x, w, group_sizes, **dict(options))


def _rounded(operand, x, axis, dtype, seed=None, signs=None):
    """Rounded values with their scales, in `dtype`."""
    if operand is None:
        return x.astype(dtype)
    rotation = operand.rotation(axis, signs)
    if operand.rule is not None:
        return operand.rule(products.rotated(x, rotation), axis)[0].astype(dtype)
    # Dimensions of a row [D] or of a matrix [D, F]; the first, rows or experts, is never shared.
    within = tuple(range(1, x.ndim))
    dims = {"block": axis, "tile": within, "tensor": within}[operand.spread]
    axes = quantize.blocked_axes(x.shape, operand.format, dims)
    values, block, tensor = quantize.scaled(
        x,
        operand.format,
        axes,
        rounding=operand.rounding,
        seed=seed,
        headroom=operand.headroom,
        rotation=rotation,
    )
    return (quantize.rescale(values, block, axes) * tensor * operand.gain).astype(dtype)
