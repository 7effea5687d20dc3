"""The transform of a tile in fast memory: a product with ones, which the matrix unit does exactly.

    y = (sum over i of +-x_i) / sqrt(block_size)

Ones and bfloat16 numbers pass the matrix unit as they are, and the scale comes after the sum: one pass
for bfloat16 x, three for float32 x, cut into parts of eight bits. No other rounding than that of sums.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from effarch.kernels.hadamard import xla

_TOP_BITS = np.int32(-(2**16))  # sign, exponent and 7 bits of mantissa: a bfloat16


def matrix(block_size: int, size: int, signs: Array | None) -> Float[Array, "size size"]:
    """Ones of `size / block_size` transforms side by side; column i times signs[i]. bfloat16."""
    ones = jnp.asarray(np.kron(np.eye(size // block_size), xla.sylvester(block_size)), jnp.bfloat16)
    if signs is None:
        return ones
    return ones * jnp.tile(signs, size // block_size).astype(jnp.bfloat16)


def parts(x: Array) -> list[Array]:
    """bfloat16 arrays whose sum is x, of bfloat16 or float32, exactly."""
    if x.dtype == jnp.bfloat16:
        return [x]
    found, rest = [], x
    for _ in range(3):
        bits = jax.lax.bitcast_convert_type(rest, jnp.int32) & _TOP_BITS
        top = jax.lax.bitcast_convert_type(bits, jnp.float32)
        found.append(top.astype(jnp.bfloat16))
        rest = rest - top
    return found


def transform(ones: Array, x: Array, axis: int, block_size: int, *, turned: bool = False) -> Array:
    """x transformed along one of its two dimensions, or its transpose with `turned`; float32."""
    leads = (axis == 0) != turned
    dims = (((1,), (axis,)) if leads else ((axis,), (1,)), ((), ()))
    total = sum(
        jax.lax.dot_general(
            *((ones, part) if leads else (part, ones)), dims, preferred_element_type=jnp.float32
        )
        for part in parts(x)
    )
    return total * np.float32(block_size**-0.5)


def with_gradient(run: Callable) -> Callable:
    """`run(x [L,P,Q], signs, view, interpret)` of a backend, with the gradient of a transform."""

    def backward(view, interpret, saved, dy):
        x, signs = saved
        h = run(dy, jnp.ones_like(signs), view, interpret)
        axis = 2 if view.is_last else 1
        along = jnp.tile(signs, x.shape[axis] // view.rotate).reshape(
            [-1 if dim == axis else 1 for dim in range(3)]
        )
        others = tuple(dim for dim in range(3) if dim != axis)
        d_signs = jnp.sum(x.astype(jnp.float32) * h, axis=others).reshape(-1, view.rotate).sum(0)
        return (h * along).astype(x.dtype), d_signs

    rule = jax.custom_vjp(run, nondiff_argnums=(2, 3))
    rule.defvjp(lambda x, signs, *static: (run(x, signs, *static), (x, signs)), backward)
    return rule
