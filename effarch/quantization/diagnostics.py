"""What rounding does to the operands of a linear layer, measured beside its product.

    error      |Q(a) - a| / |a| of x, w (for y) and e = dL/dy (for dx), after rotation
    clipped    the share of entries beyond the largest value that their block can hold, or that the
               estimator's mask keeps from the gradient
    underflow  the share of entries of e that are not 0 and become 0

`observe` hands them out as the cotangent of a probe, so layers that are scanned need nothing more.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from effarch.kernels.quantize import api as quantize
from effarch.kernels.quantize import rounding, scales
from effarch.quantization import estimators, products
from effarch.quantization.recipes import Recipe

NAMES = (
    *("x_error", "x_clipped", "w_error", "w_clipped"),
    *("e_error", "e_clipped", "e_underflow"),
)
"""The entries of a probe."""


def forward(
    recipe: Recipe,
    x: Float[Array, "... I"],
    w: Float[Array, "I O"],
    *,
    amax: Float[Array, "3"] | None = None,
    steps: Float[Array, "2"] | None = None,
    seed: Array | None = None,
) -> Float[Array, "4"]:
    """The first four of NAMES; the arguments are those of `matmul.quantized_matmul`."""
    x_TI = x.reshape(-1, x.shape[-1])
    sides = (
        (x_TI, 1, recipe.x, recipe.step_bits[0], recipe.products.y_x),
        (w, 0, recipe.w, recipe.step_bits[1], recipe.products.y_w),
    )
    found, seeds = [], recipe.forward_words(seed)
    for index, (array, axis, rule, bits, operand) in enumerate(sides):
        array = jax.lax.stop_gradient(array).astype(jnp.float32)
        if rule is not None:
            turned = quantize.Rotation(axis, rule.rotate) if rule.rotate else None
            array = products.rotated(array, turned)
            drawn = () if seeds[index] is None else (seeds[index],)
            values, mask = rule(array, axis, *drawn)
            clipped = jnp.zeros(()) if mask is None else 1 - jnp.mean(mask)
        elif bits:
            step = jax.lax.stop_gradient(steps[index])
            values = estimators.learned_step(array, step, bits)
            inside = (array >= -(2 ** (bits - 1)) * step) & (array <= (2 ** (bits - 1) - 1) * step)
            clipped = 1 - jnp.mean(inside)
        else:
            array, values, clipped = _rounded(
                operand, array, axis, None if amax is None else amax[index]
            )
        found += [_error(values, array), clipped]
    return jnp.stack(found)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def observe(
    recipe: Recipe,
    y: Array,
    probe: Float[Array, "7"],
    seen: Float[Array, "4"],
    seed: Array | None,
    amax: Array | None,
) -> Array:
    """y; the probe's cotangent becomes NAMES, `seen` being `forward`'s."""
    return y


def _observe_forward(recipe, y, probe, seen, seed, amax):
    return y, (seen, seed, amax)


def _observe_backward(recipe, saved, e):
    seen, seed, amax = saved
    seeds, signs = products.draws(recipe.products, seed)
    e_TO = e.reshape(-1, e.shape[-1]).astype(jnp.float32)
    e_TO, values, clipped = _rounded(
        recipe.products.dx_e, e_TO, 1, None if amax is None else amax[2], seeds.get("dx_e"), signs
    )
    lost = jnp.mean((values == 0) & (e_TO != 0))
    of_e = jnp.stack([_error(values, e_TO), clipped, lost])
    return e, jnp.concatenate([seen, of_e]), None, None, None


observe.defvjp(_observe_forward, _observe_backward)


def _rounded(operand, x, axis, amax, seed=None, signs=None):
    """(x after rotation, its rounded values, the share that is clipped)."""
    if operand is None:
        return x, x, jnp.zeros(())
    fmt = operand.format
    x = products.rotated(x, operand.rotation(axis, signs))
    if operand.rule is not None:
        values, mask = operand.rule(x, axis)
        return x, values, 1 - jnp.mean(mask)
    if amax is not None:
        scale, _ = scales.of_blocks(amax, fmt, 1.0)
        values, limit = rounding.nearest(x / scale, fmt.element) * scale, fmt.element.max * scale
        return x, values, jnp.mean(jnp.abs(x) > limit)
    dims = {"block": axis, "tile": (0, 1), "tensor": None}[operand.spread]
    axes = quantize.blocked_axes(x.shape, fmt, dims)
    values, block, tensor = quantize.scaled(
        x, fmt, axes, rounding=operand.rounding, seed=seed, headroom=operand.headroom
    )
    largest = quantize.rescale(jnp.full_like(x, fmt.element.max), block, axes) * tensor
    # A block's own largest value may exceed its scale times `max` by a rounding of float32.
    clipped = jnp.mean(jnp.abs(x) > largest * (1 + 1e-6))
    return x, quantize.rescale(values, block, axes) * (tensor * operand.gain), clipped


def _error(values: Array, exact: Array) -> Array:
    return jnp.linalg.norm(values - exact) / jnp.maximum(jnp.linalg.norm(exact), 1e-30)
