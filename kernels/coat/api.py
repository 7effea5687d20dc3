"""Adam's update with both moments in FP8: "COAT", arXiv 2410.19313, dynamic range expansion.

    m <- b1 m + (1 - b1) g,   v <- b2 v + (1 - b2) g^2,   d = m^ / (sqrt(v^) + eps)

m^ and v^ are corrected for their start at zero. A moment is kept as E4M3 codes and two numbers a group;
see `groups`.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from effarch.kernels import dispatch

BACKENDS = ("reference", "xla", "pallas_tpu", "pallas_gpu")


class Moment(NamedTuple):
    """A moment as it is stored; groups lie along the last dimension, the last one may be shorter."""

    codes: Array
    """float8_e4m3fn, like the parameter."""
    shared: Float[Array, "... groups 2"]
    """(hi, k) of each group."""


def coat_adam(
    g: Float[Array, "... D"],
    m: Moment,
    v: Moment,
    count: Int[Array, ""],
    *,
    b1: float,
    b2: float,
    eps: float,
    group_size: int = 128,
    expand: bool = True,
    backend: str | None = None,
) -> tuple[Float[Array, "... D"], Moment, Moment]:
    """(d, m, v) after a step with gradient g (float32); `count` is this step's number, from 1.

    `expand` False stores with k = 1. Raises ValueError for moments that are not those of g.
    """
    length = g.shape[-1] if g.ndim else 1
    groups = -(-length // min(group_size, length))
    for name, moment in (("m", m), ("v", v)):
        if moment.codes.shape != g.shape or moment.shared.shape != (*g.shape[:-1], groups, 2):
            raise ValueError(
                f"coat_adam: {name} has codes {moment.codes.shape} and shared {moment.shared.shape}, "
                f"which are not those of a gradient {g.shape} in groups of {group_size}; give what an "
                "earlier step returned for this parameter."
            )
    rates = (b1, b2, eps)
    start = 1 / jnp.stack([1 - b1**count, 1 - b2**count]).astype(jnp.float32)
    return dispatch.call(
        "coat", "coat_adam", BACKENDS, backend, g, m, v, start, rates, group_size, expand
    )
