"""Spark attention against a loop over queries in NumPy, and what must hold for its choice of keys."""

import functools
import statistics

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from effarch.models import mixers
from effarch.models.layers import spark_attend

B, H, G, K, SPLIT, V = 2, 4, 2, 12, 4, 6


def arrays(T, seed=0):
    rng = np.random.default_rng(seed)
    shapes = ((B, T, H, K), (B, T, G, K), (B, T, G, V))
    return [rng.standard_normal(shape).astype(np.float32) for shape in shapes]


def by_queries(q, k, v, segments, num_keys, window):
    """o and the number of keys, query by query in float64."""
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    o, counts = np.zeros((*q.shape[:3], V)), np.zeros(q.shape[:3], int)
    for b, t, h in np.ndindex(counts.shape):
        seen = [
            s
            for s in range(t + 1)
            if segments[b, s] == segments[b, t] != 0 and (window is None or t - s < window)
        ]
        if not seen:
            continue
        keys, values = k[b, seen, h // (H // G)], v[b, seen, h // (H // G)]
        a = keys[:, :SPLIT] @ q[b, t, h, :SPLIT] / np.sqrt(SPLIT)
        kept = np.ones(len(seen), bool)
        if len(seen) > num_keys:
            quantile = statistics.NormalDist().inv_cdf(1 - num_keys / len(seen))
            kept = (a > a.mean() + a.std() * quantile) | (a == a.max())
        p = np.where(kept, np.exp(a - a.max()), 0)
        gate = np.log1p(np.exp(keys[:, SPLIT:] @ q[b, t, h, SPLIT:] / np.sqrt(K - SPLIT)))
        o[b, t, h] = (p / p.sum() * gate) @ values
        counts[b, t, h] = kept.sum()
    return o, counts


@functools.partial(jax.jit, static_argnames=("num_keys", "window"))
def run(q, k, v, places, ids, num_keys, window=None):
    options = dict(split=SPLIT, num_keys=num_keys, window=window)
    return spark_attend.spark_attend(q, k, v, places, places, ids, ids, **options)


@pytest.mark.parametrize(("T", "window"), [(70, None), (150, 40)])
def test_values_equal_a_loop(T, window):
    """150 queries are two blocks, the second one filled up."""
    q, k, v = arrays(T)
    segments = np.repeat([[1], [2]], T, axis=1)
    segments[0, 25:] = 2
    segments[1, :3], segments[1, 60:] = 0, 3
    places = np.where(segments != 0, np.arange(T), -1)
    o, kept = run(q, k, v, places, segments, num_keys=8, window=window)
    want, counts = by_queries(q, k, v, segments, 8, window)
    np.testing.assert_array_equal(kept, counts)
    np.testing.assert_allclose(o, want, atol=1e-5)
    assert counts.max() < 30 and (counts[1, :3] == 0).all() and (counts[0, :8, 0] > 0).all()


def test_choice_and_gradients():
    """Few keys: dense softmax times softplus. A shift of the survivors changes nothing. Two-valued
    scores keep a key. Changing a later token changes nothing before it."""
    T = 40
    q, k, v = arrays(T, seed=3)
    places = np.broadcast_to(np.arange(T), (B, T))
    flat = k.copy()
    flat[..., :SPLIT] = np.where(np.arange(T) < T // 2, 1.0, -1.0)[:, None, None]
    later = v.copy()
    later[:, 30:] += 1.0

    def shifted(q, k, v):
        """The soft threshold as it is written: softmax of a - theta over the survivors."""
        grouped = jnp.repeat(k, H // G, axis=2), jnp.repeat(v, H // G, axis=2)
        a = jnp.einsum("bthk,bshk->bhts", q[..., :SPLIT], grouped[0][..., :SPLIT]) / SPLIT**0.5
        seen = places[0][:, None] >= places[0]
        n = jnp.sum(seen, -1, keepdims=True)
        mean = jnp.sum(a * seen, -1, keepdims=True) / n
        std = jnp.sqrt(jnp.sum(seen * (a - mean) ** 2, -1, keepdims=True) / n + 1e-12)
        cut = n > 8
        q_of_n = jax.scipy.special.ndtri(jnp.where(cut, 1 - 8 / n, 0.5))
        theta = jnp.where(cut, mean + q_of_n * std, 0.0)
        kept = seen & (~cut | (a > theta))
        p = jax.nn.softmax(jnp.where(kept, a - theta, -jnp.inf), axis=-1)
        gate = jnp.einsum("bthk,bshk->bhts", q[..., SPLIT:], grouped[0][..., SPLIT:])
        gate = jax.nn.softplus(gate / (K - SPLIT) ** 0.5)
        return jnp.einsum("bhts,bshv->bthv", p * gate, grouped[1])

    def ours(q, k, v, num_keys=8):
        options = dict(split=SPLIT, num_keys=num_keys)
        return spark_attend.spark_attend(q, k, v, places, places, **options)

    @jax.jit
    def run(q, k, v):
        weigh = lambda o: jnp.sum(jnp.sin(o + jnp.arange(o.size).reshape(o.shape)))  # noqa: E731
        grads = [
            jax.value_and_grad(lambda *a, f=f: weigh(f(*a)), argnums=(0, 1, 2))(q, k, v)
            for f in (shifted, lambda *a: ours(*a)[0])
        ]
        return grads, ours(q, k, v)[0], ours(q, k, later)[0], ours(q, k, v, T), ours(q, flat, v, 3)

    ((value, want), (own_value, got)), o, o_later, dense, two_valued = jax.device_get(run(q, k, v))
    assert own_value == pytest.approx(value, rel=1e-5)
    for a, b in zip(got, want):
        np.testing.assert_allclose(a, b, atol=1e-5)
    np.testing.assert_array_equal(o[:, :30], o_later[:, :30])
    assert np.abs(o - o_later)[:, 30:].max() > 0.1
    everything, counts = by_queries(q, k, v, np.ones((B, T)), T, None)
    np.testing.assert_allclose(dense[0], everything, atol=1e-5)
    np.testing.assert_array_equal(dense[1], counts)
    assert np.isfinite(two_valued[0]).all() and two_valued[1].min() >= 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(num_heads=3), "32 channels cannot be split into num_heads=3"),
        (dict(num_heads=4, num_kv_heads=3), "num_heads=4 is not a multiple of num_kv_heads=3"),
        (dict(num_heads=4, predictor_dim=8), "predictor_dim=8 must be even and leave an even"),
        (dict(num_heads=4, num_keys=0), "num_keys=0 must be at least 1"),
        (dict(num_heads=4, window=0), "window=0 must be at least 1"),
    ],
)
def test_impossible_sizes_are_refused_in_words(options, words):
    with pytest.raises(ValueError, match="spark_attention") as error:
        mixers.KINDS["spark_attention"](32, **options, rngs=nnx.Rngs(0))
    assert words in str(error.value)
