"""Statistical top-k against NumPy in float64: values, gradients, masks, counts, odd rows."""

import functools
import os
import statistics
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effarch.kernels import (
    dispatch,
    exact_top_k,
    gaussian_top_k,
    statistical_threshold,
    statistical_top_k,
)
from effarch.kernels.topk import pallas_gpu, pallas_tpu, reference

BACKENDS = ["reference", "xla"]
ROWS, N, K = 6, 40, 7


def by_hand(x, k, where):
    """y and theta of each row, entry by entry."""
    y, thetas = np.zeros(x.shape), []
    for row, values in enumerate(x):
        seen = values[where[row]]
        if len(seen) <= k:
            thetas.append(-np.inf)
            y[row, where[row]] = seen
            continue
        quantile = statistics.NormalDist().inv_cdf(1 - k / len(seen))
        theta = seen.mean() + seen.std() * quantile
        thetas.append(theta)
        for i, value in enumerate(values):
            if where[row, i] and value > theta:
                y[row, i] = value - theta
    return y, np.array(thetas)


def inputs():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((ROWS, N)) * np.arange(1, ROWS + 1)[:, None] + 0.3
    where = rng.random((ROWS, N)) < 0.8
    where[3] = False  # nothing to see
    where[4] = np.arange(N) < 5  # fewer than k
    return x, where, rng.standard_normal((ROWS, N))


@functools.partial(jax.jit, static_argnames=("backend", "stop"))
def value_and_gradient(x, where, g, backend, stop=False):
    """With and without mask."""
    found = []
    for mask in (where, None):
        options = dict(where=mask, stop_statistics=stop, backend=backend)
        y, pull = jax.vjp(lambda x, o=options: statistical_top_k(x, K, **o), x)
        theta = statistical_threshold(x, K, where=mask, backend=backend)
        found.append((y, pull(g)[0], theta[:, 0]))
    return found


@pytest.mark.parametrize("backend", BACKENDS)
def test_values_and_gradients_equal_numpy(backend):
    x, where, g = inputs()
    with jax.enable_x64(True):
        found = jax.device_get(value_and_gradient(x, where, g, backend))
        stopped = jax.device_get(value_and_gradient(x, where, g, backend, stop=True))
    for mask, (y, dx, theta), (_, dx_stopped, _) in zip(
        (where, np.ones_like(where)), found, stopped
    ):
        want, want_theta = by_hand(x, K, mask)
        np.testing.assert_allclose(y, want, atol=1e-12)
        np.testing.assert_allclose(theta, want_theta, rtol=1e-12)
        np.testing.assert_array_equal(dx_stopped, g * (want != 0))
        step = 1e-6  # smooth: no entry lies so near its threshold
        for i in range(N):
            up, down = x.copy(), x.copy()
            up[:, i] += step
            down[:, i] -= step
            difference = (by_hand(up, K, mask)[0] - by_hand(down, K, mask)[0]) / (2 * step)
            np.testing.assert_allclose(dx[:, i], np.sum(difference * g, axis=1), atol=1e-6)
        is_cut = np.isfinite(want_theta)
        np.testing.assert_allclose(dx[is_cut].sum(axis=1), 0, atol=1e-12)
        np.testing.assert_allclose((x * dx).sum(axis=1), (want * g).sum(axis=1), atol=1e-10)


@jax.jit
def from_kernels(x, g):
    """(y, dx, dx with fixed statistics, theta) of each kernel and of the reference."""

    def run(module, **options):
        options |= dict(axis=1, where=None)
        y, pull = jax.vjp(
            lambda x: module.statistical_top_k(x, 40, stop_statistics=False, **options), x
        )
        _, fixed = jax.vjp(
            lambda x: module.statistical_top_k(x, 40, stop_statistics=True, **options), x
        )
        return y, pull(g)[0], fixed(g)[0], module.statistical_threshold(x, 40, **options)

    found = {m.__name__: run(m, interpret=True) for m in (pallas_tpu, pallas_gpu)}
    return found, run(reference)


@pytest.mark.parametrize(
    "dtype",
    [jnp.float32, pytest.param(jnp.bfloat16, marks=(pytest.mark.slow, pytest.mark.ci))],
)
def test_kernels_equal_the_reference(dtype):
    """Rows of 384 entries with means far from 0 and one of equal entries; no power of two."""
    rng = np.random.default_rng(2)
    x = rng.standard_normal((16, 384)) * np.arange(1, 17)[:, None] + 30
    x[3] = 0.5
    x, g = jnp.asarray(x, dtype), jnp.asarray(rng.standard_normal((16, 384)), dtype)
    found, want = jax.device_get(from_kernels(x, g))
    for name, got in found.items():
        # float32: sums of 384 entries around 30; bfloat16: results are rounded to eight bits.
        for one, other, size in zip(got, want, (5, 1, 1, 30)):
            one, other = np.float32(one), np.float32(other)
            tolerance = (1e-5 if dtype == jnp.float32 else 2e-2) * size
            rows = np.arange(16) != 3  # its deviation of 0 has no gradient in the reference
            np.testing.assert_allclose(one[rows], other[rows], atol=tolerance, err_msg=name)
        np.testing.assert_array_equal(got[0][3], 0)
        assert np.isfinite(np.float32(got[1])).all()
        if dtype == jnp.float32:
            y, theta = by_hand(np.float64(x), 40, np.ones(x.shape, bool))
            np.testing.assert_allclose(got[0], y, atol=1e-4)
            np.testing.assert_allclose(got[3][:, 0], theta, rtol=1e-5)


def test_what_the_kernels_do_not_take_is_said():
    x = jnp.ones((4, 256))
    for name, module in (("tpu", pallas_tpu), ("gpu", pallas_gpu)):
        with pytest.raises(dispatch.Unsupported, match=f"runs on {name.upper()}s"):
            statistical_top_k(x, 5, backend=f"pallas_{name}")
        options = dict(axis=1, where=x > 0, stop_statistics=False, interpret=True)
        with pytest.raises(dispatch.Unsupported, match="entries are masked"):
            module.statistical_top_k(x, 5, **options)


def test_quantiles_are_those_of_the_normal_distribution():
    """A row of mean 0 and deviation 1 has the quantile itself as its threshold."""
    known = {
        (0.1, 1): 1.2815516,
        (0.08, 1): 1.4050716,
        (0.05, 1): 1.6448536,
        (1106, 13824): 1.4050326,
        (256, 257): -2.66138,
        (256, 512): 0.0,
        (256, 1024): 0.674490,
        (256, 4096): 1.534121,
        (256, 8192): 1.862732,
    }
    row = np.tile([-1.0, 1.0], 8192).astype(np.float32)

    @jax.jit
    def thetas(row):
        counted = []
        for k, n in known:
            count = 8192 if n == 1 else n  # an even number of entries keeps mean and deviation
            where = np.arange(len(row)) < count + count % 2
            share = k * (count + count % 2) / n
            counted.append((statistical_threshold(row[: where.sum()], share)[0],))
            counted[-1] += (statistical_threshold(row, share, where=where)[0],)
        return counted

    for found, want in zip(thetas(row), known.values()):
        np.testing.assert_allclose(found, want, atol=2e-5 if want == -2.66138 else 1e-6)


def test_counts_affinity_and_narrow_numbers():
    """1000 Gaussian rows of 4096 keep 328 on average; bfloat16 costs few of them."""
    x = np.random.default_rng(1).standard_normal((1000, 4096)).astype(np.float32)
    narrow = x.astype(jnp.bfloat16)

    @jax.jit
    def run(x, narrow):
        count = functools.partial(jnp.sum, axis=1)
        y = statistical_top_k(x, 328)
        stretched = statistical_top_k(3 * x[:8] + 5, 328)
        kept = statistical_top_k(narrow, 328) > 0
        wide = statistical_top_k(narrow.astype(jnp.float32), 328) > 0
        by_columns = statistical_top_k(x[:8].T, 328, axis=0)
        return count(y > 0), y[:8], stretched, count(kept), count(wide), by_columns

    counts, y, stretched, kept, wide, by_columns = jax.device_get(run(x, narrow))
    assert abs(counts.mean() - 328) < 2 and 8 < counts.std() < 14
    np.testing.assert_allclose(stretched, 3 * y, atol=1e-5)
    np.testing.assert_allclose(by_columns.T, y, atol=1e-5)
    assert np.abs(kept - wide).max() <= 0.05 * 328
    assert abs(kept.mean() - wide.mean()) < 0.01 * 328


def test_odd_rows_and_exact_selection():
    """k >= n is the identity, a constant row gives 0, ties are broken by order; nothing is NaN."""
    ties = np.array([[1.0, 3.0, 3.0, 2.0, 3.0, -9.0]], np.float32)

    @jax.jit
    def run(ties):
        constant = jnp.full((2, 64), 0.7)
        y, pull = jax.vjp(lambda x: statistical_top_k(x, 5), constant)
        exact, exact_pull = jax.vjp(lambda x: exact_top_k(x, 2), ties)
        return {
            "constant": y,
            "constant_gradient": pull(jnp.ones_like(y))[0],
            "all": statistical_top_k(ties, 6),
            "none": statistical_top_k(ties, 0),
            "dense": gaussian_top_k(ties, 0.0),
            "exact": exact,
            "exact_gradient": exact_pull(jnp.full(ties.shape, 2.0))[0],
            "exact_columns": exact_top_k(ties.T, 3, axis=0).T,
        }

    found = jax.device_get(run(ties))
    np.testing.assert_array_equal(found["constant"], np.zeros((2, 64)))
    np.testing.assert_array_equal(found["constant_gradient"], np.zeros((2, 64)))
    np.testing.assert_array_equal(found["all"], ties)
    np.testing.assert_array_equal(found["dense"], ties)
    np.testing.assert_array_equal(found["none"], np.zeros_like(ties))
    np.testing.assert_array_equal(found["exact"], [[0, 3, 3, 0, 0, 0]])
    np.testing.assert_array_equal(found["exact_gradient"], [[0, 2, 2, 0, 0, 0]])
    np.testing.assert_array_equal(found["exact_columns"], [[0, 3, 3, 0, 3, 0]])


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((np.zeros((2, 3), int), 1), {}, "x has dtype int"),
        ((np.zeros((2, 3)), -1), {}, "k=-1 must be a number of entries"),
        ((np.zeros((2, 3)), 1), dict(axis=2), "axis=2 does not exist"),
        ((np.zeros((2, 3)), 1), dict(where=np.ones(3)), "where is float"),
        ((np.zeros((2, 3)), 1), dict(where=np.ones((4, 2, 3), bool)), "where is bool"),
        ((np.zeros((2, 3)), 1), dict(backend="cuda"), "backend 'cuda' does not exist"),
    ],
)
def test_wrong_arguments_are_named(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        statistical_top_k(*arguments, **options)
    with pytest.raises(ValueError, match=r"sparsity=1\.5 must lie between"):
        gaussian_top_k(np.zeros((2, 3)), 1.5)


SHARDED = """
import jax, numpy as np
from effarch.kernels import statistical_top_k

x, g = np.random.default_rng(0).standard_normal((2, 4, 512)).astype(np.float32) + 2
mesh = jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data", "tensor"))


def run(x, g):
    y, pull = jax.vjp(lambda x: statistical_top_k(x, 41), x)
    return y, pull(g)[0]


want = jax.jit(run)(x, g)
got = jax.jit(run, in_shardings=(place, place), out_shardings=(place, place))(x, g)
assert not got[0].is_fully_replicated
np.testing.assert_array_equal(np.asarray(got[0]) > 0, np.asarray(want[0]) > 0)
for a, b in zip(got, want):
    np.testing.assert_allclose(a, b, atol=1e-6 * np.abs(b).max())
"""


@pytest.mark.multiprocess
@pytest.mark.slow
@pytest.mark.ci
def test_statistics_of_a_split_axis_are_global():
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", SHARDED], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
