"""The statistical threshold with its gradient written out: it keeps x, mean and deviation alone.

With M the survivors, G = sum of the upstream gradient g over M, q the quantile, s the deviation:

    dx_i = g_i M_i - G (1/n + q (x_i - mean) / (n s))

The mean comes first and the squares are of differences from it: the difference of mean square and
squared mean would lose everything in narrow formats.
"""

import functools
import statistics

import jax
import jax.numpy as jnp
from jax.scipy.special import ndtri

from effarch.kernels import varying

_LEAST = 1e-12  # a deviation of 0 has no gradient


def statistical_top_k(x, k, *, axis, where, stop_statistics):
    """See `api.statistical_top_k`."""
    if where is None and k >= x.shape[axis]:
        return x
    x, where = varying.align([x, where])
    return _soft(x, where, k, axis, stop_statistics)


def statistical_threshold(x, k, *, axis, where):
    """See `api.statistical_threshold`."""
    wide = _wide(x)
    mean, spread = _moments(wide, axis, where)
    return _threshold(mean, spread, *_quantile(k, x.shape[axis], axis, where, wide.dtype))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _soft(x, where, k, axis, stop_statistics):
    return _forward(x, where, k, axis, stop_statistics)[0]


def _forward(x, where, k, axis, stop_statistics):
    wide = _wide(x)
    mean, spread = _moments(wide, axis, where)
    quantile, is_cut = _quantile(k, x.shape[axis], axis, where, wide.dtype)
    theta = _threshold(mean, spread, quantile, is_cut)
    y = jnp.where(_above(wide, theta, where), wide - jnp.where(is_cut, theta, 0), 0)
    return y.astype(x.dtype), (x, where, mean, spread)


def _backward(k, axis, stop_statistics, saved, dy):
    x, where, mean, spread = saved
    wide, dy = _wide(x), _wide(dy)
    quantile, is_cut = _quantile(k, x.shape[axis], axis, where, wide.dtype)
    theta = _threshold(mean, spread, quantile, is_cut)
    dx = jnp.where(_above(wide, theta, where), dy, 0)
    if not stop_statistics:
        n = _count(wide, axis, where)
        total = jnp.where(is_cut, jnp.sum(dx, axis, keepdims=True), 0) / n
        through = total * (1 + quantile * (wide - mean) / jnp.maximum(spread, _LEAST))
        dx = dx - (through if where is None else jnp.where(where, through, 0))
    return dx.astype(x.dtype), None


_soft.defvjp(_forward, _backward)


def _wide(x):
    return x.astype(jnp.result_type(jnp.float32, x))


def _count(x, axis, where):
    """Entries of each row, at least 1."""
    if where is None:
        return x.shape[axis]
    return jnp.maximum(jnp.sum(where, axis, keepdims=True, dtype=x.dtype), 1)


def _moments(x, axis, where):
    n = _count(x, axis, where)

    def mean(values):
        values = values if where is None else jnp.where(where, values, 0)
        return jnp.sum(values, axis, keepdims=True) / n

    center = mean(x)
    return center, jnp.sqrt(mean(jnp.square(x - center)))


def _quantile(k, length: int, axis, where, dtype):
    """Q(1 - k/n), and whether n > k, so that there is something to cut."""
    if where is None:
        is_cut = length > k
        return statistics.NormalDist().inv_cdf(1 - k / length) if is_cut else 0.0, is_cut
    n = jnp.sum(where, axis, keepdims=True, dtype=dtype)
    is_cut = n > k
    return ndtri(jnp.where(is_cut, 1 - k / jnp.maximum(n, 1), 0.5)), is_cut


def _threshold(mean, spread, quantile, is_cut):
    return jnp.where(is_cut, mean + spread * quantile, -jnp.inf)


def _above(x, theta, where):
    return x > theta if where is None else where & (x > theta)
