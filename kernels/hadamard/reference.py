"""The Hadamard transform by its recursion: sums and differences of halves."""

import jax.numpy as jnp


def hadamard(x, block_size, axis, signs, cut=None):
    """See `api.hadamard`."""
    moved = jnp.moveaxis(x.astype(jnp.float32), axis, -1)
    blocks = moved.reshape(-1, block_size)
    blocks = blocks if signs is None else blocks * signs
    y = _butterfly(blocks) * block_size**-0.5
    return jnp.moveaxis(y.reshape(moved.shape), -1, axis).astype(x.dtype)


def _butterfly(x):
    if x.shape[-1] == 1:
        return x
    low, high = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([_butterfly(low + high), _butterfly(low - high)], axis=-1)
