"""Moving rows by gathers alone: forward by one index, backward by its inverse.

XLA would turn the gradient of a gather into a scatter-add, which is slow everywhere; where the inverse
is at hand it is a gather as well. An index out of range stands for a row of zeros.
"""

import jax
import jax.numpy as jnp

from effarch.kernels import varying


def take(x: jax.Array, index: jax.Array, inverse: jax.Array) -> jax.Array:
    """y[m] = x[index[m]], zeros out of range; x[n] goes to y[inverse[n]] alone, or nowhere."""
    return _take(*varying.align([x, index, inverse]))


def gather(x: jax.Array, index: jax.Array) -> jax.Array:
    """x[index], zeros where the index is out of range."""
    return x.at[index].get(mode="fill", fill_value=0)


@jax.custom_vjp
def _take(x, index, inverse):
    del inverse
    return gather(x, index)


def _take_fwd(x, index, inverse):
    return gather(x, index), inverse


def _take_bwd(inverse, g):
    return gather(g, inverse), None, None


_take.defvjp(_take_fwd, _take_bwd)


def group_of_rows(group_sizes: jax.Array, num: int) -> jax.Array:
    """The group of each of the first `num` rows, [num]; E past the last group."""
    return jnp.searchsorted(jnp.cumsum(group_sizes), jnp.arange(num), side="right")
