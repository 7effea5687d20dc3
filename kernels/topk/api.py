"""Keeping about k of n numbers by a threshold from their mean and spread, without sorting.

    theta = mean(x) + std(x) * Q(1 - k / n)        Q: quantile function of the standard normal
    y     = max(x - theta, 0)

Spark Transformer, arXiv 2506.06644; Gemma 3n uses the same with a fixed sparsity. For Gaussian entries
about k survive, with a standard deviation of about 0.64 sqrt(k (1 - k/n)); k is an aim, not a bound.
"""

import jax
import jax.numpy as jnp

from effarch.kernels import dispatch

BACKENDS = ("reference", "xla", "pallas_tpu", "pallas_gpu")


def statistical_top_k(
    x: jax.Array,
    k: float,
    *,
    axis: int = -1,
    where: jax.Array | None = None,
    stop_statistics: bool = False,
    backend: str | None = None,
) -> jax.Array:
    """x - theta where that is above 0, else 0, along `axis`; in x's dtype.

    k: how many are to survive, any number >= 0; with k >= n everything is kept and not shifted.
    where [like x]: entries that count; the others are neither counted nor kept. n is then each row's
    own number of entries.
    The gradient flows through mean and deviation, so that entries below the threshold get a little;
    `stop_statistics` stops that. Statistics are float32 (float64 for float64), population deviation,
    over the whole axis even if a mesh splits it (under jit, not inside shard_map).
    Raises ValueError for arguments that do not fit.
    """
    x, where = _checked(x, k, axis, where)
    if k == 0:
        return jnp.zeros_like(x)
    options = dict(axis=axis % x.ndim, where=where, stop_statistics=stop_statistics)
    return dispatch.call("topk", "statistical_top_k", BACKENDS, backend, x, k, **options)


def statistical_threshold(
    x: jax.Array,
    k: float,
    *,
    axis: int = -1,
    where: jax.Array | None = None,
    backend: str | None = None,
) -> jax.Array:
    """theta with `axis` kept at length 1, float32, without gradient; -inf where k >= n."""
    x, where = _checked(x, k, axis, where)
    if k == 0:
        return jnp.max(jnp.full_like(x, jnp.inf, jnp.float32), axis, keepdims=True)
    options = dict(axis=axis % x.ndim, where=where)
    x = jax.lax.stop_gradient(x)
    return dispatch.call("topk", "statistical_threshold", BACKENDS, backend, x, k, **options)


def gaussian_top_k(
    x: jax.Array, sparsity: float, *, axis: int = -1, backend: str | None = None
) -> jax.Array:
    """Gemma 3n's form: `statistical_top_k` that zeroes the share `sparsity` of a Gaussian row."""
    if not 0 <= sparsity <= 1:
        raise ValueError(f"gaussian_top_k: sparsity={sparsity} must lie between 0 and 1.")
    k = (1 - sparsity) * jnp.shape(x)[axis]
    return statistical_top_k(x, k, axis=axis, backend=backend)


def exact_top_k(x: jax.Array, k: int, *, axis: int = -1) -> jax.Array:
    """x where it is one of the k largest along `axis`, else 0: by sorting, for comparison.

    The gradient passes the kept entries alone. Of equal entries the first ones are kept.
    """
    x, _ = _checked(x, k, axis, None)
    return jnp.where(largest(x, k, axis=axis), x, 0)


def largest(x: jax.Array, k: int, *, axis: int = -1) -> jax.Array:
    """Whether each entry is one of the k largest along `axis`: exactly k are, the first of equals."""
    rows = jnp.moveaxis(jax.lax.stop_gradient(x), axis, -1)
    _, index = jax.lax.top_k(rows, min(k, rows.shape[-1]))
    found = jnp.put_along_axis(jnp.zeros(rows.shape, bool), index, True, axis=-1, inplace=False)
    return jnp.moveaxis(found, -1, axis)


def _checked(x, k, axis, where):
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"top-k: x has dtype {x.dtype}; give a floating-point array.")
    if not -x.ndim <= axis < x.ndim:
        raise ValueError(f"top-k: axis={axis} does not exist in x of shape {x.shape}.")
    if not k >= 0:
        raise ValueError(f"top-k: k={k} must be a number of entries, 0 or more.")
    if where is None:
        return x, None
    where = jnp.asarray(where)
    if where.dtype != bool or jnp.broadcast_shapes(where.shape, x.shape) != x.shape:
        raise ValueError(
            f"top-k: where is {where.dtype}{list(where.shape)}; give booleans that broadcast to x's "
            f"shape {x.shape}."
        )
    return x, jnp.broadcast_to(where, x.shape)
