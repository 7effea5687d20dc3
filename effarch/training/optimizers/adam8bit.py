"""8-bit AdamW: "8-bit Optimizers via Block-wise Quantization", arXiv 2110.02861.

A block of values is divided by its largest magnitude and rounded to 256 levels that are dense near
zero ("dynamic tree": decades 10^-6 ... 1, each next one with twice the levels); m has signed
levels, v unsigned ones. Matrices only: embeddings, heads and vectors keep float32 moments.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

from effarch.training.optimizers import stored_moments, updates


def adam8bit(
    schedule: optax.ScalarOrSchedule,
    *,
    b1: float = 0.9,
    b2: float = 0.95,
    eps: float = 1e-8,
    weight_decay: float = 0.1,
    group_size: int = 256,
    groups: Any,
) -> optax.GradientTransformation:
    """AdamW with 2 + 8 / group_size bytes of state for each weight of a matrix rather than 8."""
    updates.check_range("adam8bit.b1", b1, 0, 1)
    updates.check_range("adam8bit.b2", b2, 0, 1)
    updates.check_range("adam8bit.weight_decay", weight_decay, 0)
    updates.check_range("adam8bit.group_size", group_size, 1)
    moments = codec(levels(is_signed=True), group_size), codec(levels(is_signed=False), group_size)
    return updates.finish(
        {
            "adam8bit": stored_moments.scale_by_adam(*moments, b1=b1, b2=b2, eps=eps),
            "adam": optax.scale_by_adam(b1, b2, eps),
        },
        lambda group: "adam8bit" if group.kind == "matrix" else "adam",
        groups=groups,
        schedule=schedule,
        weight_decay=weight_decay,
    )


def levels(*, is_signed: bool) -> np.ndarray:
    """The 256 levels in [-1, 1] or [0, 1], ascending, float32: 0, 1 and the middles of equal parts of
    [0.1, 1] times 10^(i - 6), for i = 0 ... 6; 2^i parts if signed (and their negatives), else 2^(i+1).
    """
    found = [0.0, 1.0]
    for i in range(7):
        edges = np.linspace(0.1, 1, 2 ** (i if is_signed else i + 1) + 1)
        middles = 10.0 ** (i - 6) * (edges[1:] + edges[:-1]) / 2
        found += [*middles, *(-middles if is_signed else [])]
    return np.sort(np.array(found, np.float32))


def codec(levels: np.ndarray, group_size: int) -> stored_moments.Codec:
    """uint8 numbers of levels; a group shares its largest magnitude."""
    middles = (levels[1:] + levels[:-1]) / 2

    def encode(x: Array) -> tuple[Array, Array]:
        amax = jnp.max(jnp.abs(x), axis=-1, keepdims=True)
        share = x / jnp.where(amax > 0, amax, 1.0)
        return jnp.searchsorted(jnp.asarray(middles), share).astype(jnp.uint8), amax

    def decode(codes: Array, shared: Array) -> Array:
        return jnp.asarray(levels)[codes] * shared

    return stored_moments.Codec(encode, decode, group_size)
