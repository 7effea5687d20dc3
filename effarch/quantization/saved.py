"""What a function keeps for its backward pass, as FP8 copies: activations of "COAT", arXiv 2410.19313.

    forward: y = f(x);   kept: E4M3 numbers of x, groups along the last dimension sharing a scale
    backward: dx = (df/dx at the copy) dy

Norms and activation functions keep their inputs so; a linear layer with one scale a tensor keeps the FP8
numbers that it multiplied anyway (see `products`). Where we differ: a group's scale is a power of two
in one byte, which costs an E4M3 number no precision.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array

from effarch.kernels.quantize import api as quantize
from effarch.kernels.quantize.formats import ELEMENTS, Format

_FORMAT = Format(ELEMENTS["e4m3"], scale="e8m0", scale_rounding="ceil")


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def small(function: Callable, group: int, rounded: tuple[Array, ...], exact: tuple[Array, ...]):
    """function(*rounded, *exact), of which the backward pass sees `rounded` as FP8 copies.

    `function` must be one object from call to call and close over no arrays. `group` divides the last
    dimension of every array in `rounded`; a copy takes 1 + 1 / group bytes an element.
    """
    return function(*rounded, *exact)


def _forward(function, group, rounded, exact):
    fmt = dataclasses.replace(_FORMAT, block_size=group)
    kept = tuple(quantize.quantize(x, fmt) for x in rounded)
    return function(*rounded, *exact), (kept, exact, tuple(jnp.zeros((), x.dtype) for x in rounded))


def _backward(function, group, saved, dy):
    kept, exact, like = saved
    copies = [one.dequantize().astype(empty.dtype) for one, empty in zip(kept, like)]
    gradients = jax.vjp(function, *copies, *exact)[1](dy)
    return tuple(gradients[: len(copies)]), tuple(gradients[len(copies) :])


small.defvjp(_forward, _backward)
