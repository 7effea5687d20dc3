"""The quantized product of experts against each expert's own product."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effarch.quantization import grouped, matmul, recipes

M, D, F, SIZES = 64, 32, 32, (32, 0, 24)
SEED = np.array([3, 4], np.uint32)


def gaussian(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


X, W, E = gaussian(M, D), gaussian(3, D, F, seed=1), gaussian(M, F, seed=2)


@functools.partial(jax.jit, static_argnums=0)
def run(recipe, x, w, e, sizes, seed):
    def product(x, w):
        return grouped.quantized_grouped_matmul(x, w, sizes, recipe, seed=seed)

    y, vjp = jax.vjp(product, x, w)
    return y, *vjp(e)


def check_against_single_products(recipe, with_dx):
    """y (and dx) of each group equal the dense quantized product's; dw is that of unrounded e."""
    y, dx, dw = run(recipe, X, W, E, np.array(SIZES), SEED)
    start = 0
    for index, size in enumerate(SIZES):
        rows = slice(start, start + size)
        start += size
        if not size:
            np.testing.assert_array_equal(dw[index], 0)
            continue

        def one(x, w, e):
            def product(x, w):
                return matmul.quantized_matmul(x, w, recipe, dtype=jnp.float32, seed=SEED)

            if not with_dx:
                return product(x, w), x
            y, vjp = jax.vjp(product, x, w)
            return y, vjp(e)[0]

        want_y, want_dx = jax.jit(one)(X[rows], W[index], E[rows])
        np.testing.assert_allclose(y[rows], want_y, rtol=1e-5, atol=1e-5)
        if with_dx:
            np.testing.assert_allclose(dx[rows], want_dx, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(dw[index], X[rows].T @ E[rows], rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(y[start:], 0)
    np.testing.assert_array_equal(dx[start:], 0)


def test_int8_experts_are_int8_products():
    check_against_single_products(recipes.int8(), with_dx=True)


def test_mxfp8_experts_are_mxfp8_products():
    check_against_single_products(recipes.mxfp8(), with_dx=False)


def test_random_recipes_give_gradients_near_the_exact_ones():
    recipe = recipes.quartet()
    got = run(recipe, X, W, E, np.array(SIZES), SEED)
    want = run(recipes.Recipe(), X, W, E, np.array(SIZES), SEED)
    for one, other in zip(got, want):
        assert np.linalg.norm(one - other) < 0.4 * np.linalg.norm(other)
        assert not np.array_equal(one, other)


def test_recipes_with_state_are_refused():
    with pytest.raises(ValueError, match="do not serve experts"):
        run(recipes.fp8_delayed(), X, W, E, np.array(SIZES), SEED)
