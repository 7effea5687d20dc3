"""The statistical threshold as it is written, with plain autodiff."""

import jax
import jax.numpy as jnp
from jax.scipy.special import ndtri


def statistical_top_k(x, k, *, axis, where, stop_statistics):
    """See `api.statistical_top_k`."""
    wide = x.astype(jnp.result_type(jnp.float32, x))
    where = jnp.ones(x.shape, bool) if where is None else where
    theta = statistical_threshold(x, k, axis=axis, where=where)
    theta = jax.lax.stop_gradient(theta) if stop_statistics else theta
    shift = jnp.where(jnp.isfinite(theta), theta, 0)
    return jnp.where(where & (wide > theta), wide - shift, 0).astype(x.dtype)


def statistical_threshold(x, k, *, axis, where):
    """See `api.statistical_threshold`; with gradient."""
    wide = x.astype(jnp.result_type(jnp.float32, x))
    where = jnp.ones(x.shape, bool) if where is None else where
    n = jnp.sum(where, axis, keepdims=True)
    is_cut = n > k
    where = where | ~is_cut  # no mean of nothing, whose gradient would be NaN
    spread = jnp.std(wide, axis, where=where, keepdims=True)
    quantile = ndtri(jnp.where(is_cut, 1 - k / jnp.maximum(n, 1), 0.5).astype(wide.dtype))
    mean = jnp.mean(wide, axis, where=where, keepdims=True)
    return jnp.where(is_cut, mean + spread * quantile, -jnp.inf)
