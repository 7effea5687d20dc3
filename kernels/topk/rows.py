"""What the kernels of both platforms do to whole rows in fast memory; the formulas of `xla`."""

import statistics
from typing import NamedTuple

import jax.numpy as jnp

from effarch.kernels import dispatch

_LEAST = 1e-12  # a deviation of 0 has no gradient
LONGEST = 65536


class Plan(NamedTuple):
    """What is known while tracing."""

    length: int
    """Entries of a row."""
    quantile: float
    interpret: bool
    rows: int = 1
    """Of a grid step."""


def plan(x, k, axis: int, where, interpret: bool) -> Plan:
    """Raises `Unsupported` for what the kernels do not take."""
    length = x.shape[axis]
    if where is not None or axis != x.ndim - 1 or k >= length:
        raise dispatch.Unsupported(
            "entries are masked or all kept, or do not lie along the last axis"
        )
    if x.dtype not in (jnp.float32, jnp.bfloat16):
        raise dispatch.Unsupported(f"x is {x.dtype}, not float32 or bfloat16")
    if length > LONGEST or x.size == 0:
        raise dispatch.Unsupported(f"rows of {length} are not 1 to {LONGEST} entries")
    return Plan(length, statistics.NormalDist().inv_cdf(1 - k / length), interpret)


def moments(x, length: int, is_real=None):
    """Mean and deviation of rows, kept wide; squares are of differences from the mean."""
    mean = jnp.sum(x, axis=1, keepdims=True) / length
    off = x - mean if is_real is None else jnp.where(is_real, x - mean, 0.0)
    return mean, jnp.sqrt(jnp.sum(off * off, axis=1, keepdims=True) / length)


def gradient(x, dy, mean, spread, plan: Plan, stop_statistics: bool):
    """dx of rows, float32; entries beyond the row have dy 0."""
    dx = jnp.where(x > mean + plan.quantile * spread, dy, 0.0)
    if stop_statistics:
        return dx
    total = jnp.sum(dx, axis=1, keepdims=True) / plan.length
    through = 1 + plan.quantile * (x - mean) / jnp.maximum(spread, _LEAST)
    return dx - total * through
