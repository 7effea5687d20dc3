"""Quantization by definition: a search among the format's values. Slow and plain."""

import jax.numpy as jnp

from effarch.kernels.hadamard import reference as hadamard
from effarch.kernels.quantize import api, rounding
from effarch.kernels.quantize.formats import ELEMENTS


def quantize(x, fmt, axes, shrink, ties, seed, rotation, cut=None):
    """See `xla.quantize`."""
    x = x.astype(jnp.float32)
    if rotation is not None:
        x = hadamard.hadamard(x, rotation.block_size, rotation.axis, rotation.signs)
    noise = None if seed is None else api.split(rounding.uniform(seed, x.shape), axes)[0]
    blocks, within = api.split(x, axes)
    amax = jnp.minimum(jnp.max(jnp.abs(blocks), axis=within, keepdims=True), 2.0**126)
    block, tensor = _scales(amax, fmt, shrink)
    values = _round(blocks / (block * tensor), fmt.element, ties, noise)
    return values.reshape(x.shape), jnp.squeeze(block, within), tensor


def _scales(amax, fmt, shrink):
    tiny, largest = 2.0**-126, fmt.element.max
    if fmt.scale == "float32":
        scale = jnp.where(amax == 0, 1.0, jnp.maximum(amax / (largest * shrink), tiny))
        return scale, jnp.float32(1)
    if fmt.scale == "e8m0":
        block = _power_of_two(jnp.maximum(amax, tiny), fmt)
        return jnp.where(jnp.isnan(amax), amax, block), jnp.float32(1 / shrink)
    tensor = jnp.max(amax) / (448 * largest)
    tensor = jnp.where(tensor == 0, 1.0, jnp.maximum(tensor, tiny))
    block = _round(amax / (largest * shrink) / tensor, ELEMENTS["e4m3"], "even", None)
    return jnp.where(block == 0, 1.0, block), tensor


def _power_of_two(amax, fmt):
    """Counts the powers of two that lie below the amax, in each mode's sense."""
    powers = jnp.ldexp(jnp.float32(1), jnp.arange(-126, 128))
    if fmt.scale_rounding == "floor":
        above = jnp.sum(amax[..., None] >= powers, axis=-1) - 1 - fmt.element.emax
    else:
        ratio = jnp.maximum(amax / fmt.element.max, 2.0**-126)[..., None]
        edge = {"ceil": ratio > powers, "nearest": ratio / powers > 2**0.5}[fmt.scale_rounding]
        above = jnp.sum(edge, axis=-1)
    return powers[jnp.clip(above, 0, 253)]


def _round(x, element, ties, noise):
    grid = jnp.asarray(element.magnitudes())
    size = jnp.minimum(jnp.abs(x), grid[-1])
    low = jnp.clip(jnp.searchsorted(grid, size, side="right") - 1, 0, len(grid) - 2)
    part = (size - grid[low]) / (grid[low + 1] - grid[low])
    if noise is not None:
        up = part + noise >= 1
    elif ties == "even":
        up = (part > 0.5) | ((part == 0.5) & (low % 2 == 1))
    else:
        up = part > 0.5 if ties == "zero" else part >= 0.5
    return jnp.copysign(grid[low + up], x)
