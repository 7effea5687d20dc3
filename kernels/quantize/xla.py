"""Quantization in plain JAX: scales by reduction, rounding by arithmetic on bits."""

import jax.numpy as jnp

from effarch.kernels.quantize import rounding, scales


def quantize(blocks, fmt, within, shrink, ties, noise):
    """(values on the grid, block scales, tensor scale); see `api.scaled`.

    `blocks` is x with every blocked dimension split into (number, size); `within` are the sizes'
    dimensions, over which one scale is shared. `noise` None rounds to nearest.
    """
    amax = jnp.max(jnp.abs(blocks), axis=within, keepdims=True)
    block, tensor = scales.of_blocks(amax, fmt, shrink)
    scaled = blocks / (block if fmt.scale == "float32" else block * tensor)
    if noise is None:
        return rounding.nearest(scaled, fmt.element, ties), block, tensor
    return rounding.stochastic(scaled, fmt.element, noise), block, tensor
