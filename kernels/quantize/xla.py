"""Quantization in plain JAX: scales by reduction, rounding by arithmetic on bits."""

import jax.numpy as jnp

from effarch.kernels.hadamard import xla as hadamard
from effarch.kernels.quantize import api, rounding, scales


def quantize(x, fmt, axes, shrink, ties, seed, rotation, cut=None):
    """(values on the grid like x, block scales, tensor scale), float32; see `api.scaled`.

    `shrink`: 1, or the format's headroom. `seed` None rounds to nearest. `cut` is for kernels alone.
    """
    x = x.astype(jnp.float32)
    if rotation is not None:
        x = hadamard.hadamard(x, rotation.block_size, rotation.axis, rotation.signs)
    noise = None if seed is None else api.split(rounding.uniform(seed, x.shape), axes)[0]
    blocks, within = api.split(x, axes)
    values, block, tensor = round_blocks(blocks, within, fmt, shrink, ties, noise)
    return values.reshape(x.shape), jnp.squeeze(block, within), jnp.asarray(tensor)


def round_blocks(blocks, within, fmt, shrink, ties, noise, tensor=None, even=jnp.round):
    """(values, block scales kept wide, tensor scale) of x with every blocked dimension split.

    `within`: the dimensions over which one scale is shared. `tensor`: its scale, if
    `blocks` is but a part of it. `even` rounds to whole numbers, ties to even ones.
    """
    amax = jnp.max(jnp.abs(blocks), axis=within, keepdims=True)
    block, tensor = scales.of_blocks(amax, fmt, shrink, tensor, even)
    scaled = blocks / (block if fmt.scale == "float32" else block * tensor)
    if noise is None:
        return rounding.nearest(scaled, fmt.element, ties, even), block, tensor
    return rounding.stochastic(scaled, fmt.element, noise), block, tensor
