"""Quartet's variants against numpy loops: forward and backward roundings, gains, signs."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

from effarch.models.context import Context
from effarch.models.layers import linear, quantizer
from effarch.quantization import diagnostics, grouped, matmul, products, recipes

T, I, O = 64, 32, 64
SEED = np.array([1, 2], np.uint32)
GAIN = 1.009276
H = np.array([[(-1) ** (i & j).bit_count() for j in range(32)] for i in range(32)]) / np.sqrt(32)


def gaussian(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


X, W, E = gaussian(T, I), gaussian(I, O, seed=1) / 8, gaussian(T, O, seed=2)


def relative(got, want):
    return np.linalg.norm(got - want) / np.linalg.norm(want)


def turned(x, signs=None):
    """x times blocks of H along the last axis; `signs` come after it, as in the published code."""
    h = H if signs is None else H * signs
    return (x.reshape(*x.shape[:-1], -1, 32) @ h).reshape(x.shape)


def in_blocks(x, scale):
    """E2M1 in blocks of 32 along the last axis; and which entries lie within its range."""
    out, inside = np.zeros_like(x), np.ones(x.shape, bool)
    for *row, start in np.ndindex(*x.shape[:-1], x.shape[-1] // 32):
        part = (*row, slice(start * 32, start * 32 + 32))
        unit = scale(x[part])
        inside[part] = np.abs(x[part]) < 6 * unit
        codes = np.clip(x[part] / unit, -6, 6).astype(ml_dtypes.float4_e2m1fn)
        out[part] = codes.astype(np.float64) * unit
    return out, inside


def quest(x):
    return in_blocks(x, lambda block: 2.0 ** round(np.log2(2.92247856 / 6 * block.std() + 1e-8)))


def nearest(x):
    """3/4 of x, so that nothing clips, and 4/3 of that."""
    return in_blocks(x, lambda block: 4 / 3 * 2.0 ** (np.floor(np.log2(np.abs(block).max())) - 2))[
        0
    ]


BACKWARD = {"nearest": nearest, "pma": lambda x: GAIN * nearest(x), "quest": lambda x: quest(x)[0]}


@jax.jit
def layers(x, w, e):
    """y, dx, dw and what is seen of e, for every backward rounding with a fixed transform."""
    found = {}
    for name in BACKWARD:
        recipe = recipes.quartet(gradient=name, signs=False)

        def layer(x, w, probe, recipe=recipe):
            y = matmul.quantized_matmul(x, w, recipe, dtype=jnp.float32)
            return diagnostics.observe(recipe, y, probe, jnp.zeros(4), None, None)

        y, vjp = jax.vjp(layer, x, w, jnp.zeros(7))
        found[name] = y, *vjp(e)
    return found


def test_backward_roundings_by_a_loop():
    """Signs after the transform, as the published code has them, change nothing with largest values."""
    x, w, e = (a.astype(np.float64) for a in (X, W.T, E))
    (x, mask_x), (w, mask_w) = quest(turned(x)), quest(turned(w))
    signs = np.random.default_rng(3).choice([-1.0, 1.0], 32)
    for name, (y, dx, dw, seen) in layers(X, W, E).items():
        after = None if name == "quest" else signs  # a deviation is not that of other signs

        def rounded(a, name=name, after=after):
            return BACKWARD[name](turned(a, after))

        want_dx = turned(mask_x * (rounded(e) @ rounded(w.T).T))
        want_dw = turned(mask_w * (rounded(e.T) @ rounded(x.T).T)).T
        assert relative(y, x @ w.T) < 1e-5
        assert relative(dx, want_dx) < 1e-5
        assert relative(dw, want_dw) < 1e-5
        error, clipped, _ = np.asarray(seen)[4:]
        assert error == pytest.approx(relative(rounded(e), turned(e, after)), rel=1e-4)
        outside = 1 - quest(turned(e))[1].mean() if name == "quest" else 0
        assert clipped == pytest.approx(outside, abs=1e-6)


def test_pma_takes_the_bias_of_gaussians_away():
    """<Q(e), e> / <e, e>: 0.991 to nearest with 3/4 of headroom, 1.0002 times 1.009276."""
    operands = {
        kind: recipes.quartet(gradient=kind, rotate=False).products.dx_e
        for kind in ("nearest", "pma")
    }

    @jax.jit
    def rounded(e):
        """Q(e), the gradient of x in a product with the unit matrix."""
        unit, found = jnp.eye(64), {}
        for kind, operand in operands.items():
            one = products.Products(dx_e=operand)
            _, vjp = jax.vjp(
                lambda x, one=one: products.multiply(one, x, unit, dtype=jnp.float32), 0 * e
            )
            found[kind] = vjp(e)[0]
        return found

    e = gaussian(16384, 64)
    found = {kind: np.vdot(q, e) / np.vdot(e, e) for kind, q in rounded(e).items()}
    assert found["nearest"] == pytest.approx(0.991, abs=1e-3)
    assert found["pma"] == pytest.approx(1.0002, abs=1e-3)


def test_stochastic_forward_rounding_is_unbiased_and_one_for_both_passes():
    recipe = recipes.quartet(forward="stochastic", backward="none")
    nearest_one = recipes.quartet(forward="nearest", backward="none")

    def layer(recipe, seed):
        def product(x, w):
            return matmul.quantized_matmul(x, w, recipe, dtype=jnp.float32, seed=seed)

        y, vjp = jax.vjp(product, X, W)
        return y, *vjp(jnp.eye(T, O))

    @jax.jit
    def run(seeds):
        draws = jax.lax.map(lambda seed: layer(recipe, seed), seeds)
        seen = diagnostics.forward(recipe, X, W, seed=seeds[0])
        return draws, layer(recipe, None), layer(nearest_one, None), seen

    seeds = jax.random.bits(jax.random.key(0), (400, 2), jnp.uint32)
    draws, unseeded, to_nearest, seen = jax.tree.map(np.asarray, run(seeds))
    for many, exact in zip(draws, (X @ W, W.T, X.T)):
        one = relative(many[0], exact)
        assert 0.1 < one < 0.4
        assert relative(many.mean(0), exact) < 1.25 * one / 20
        assert relative(many[0], many[1]) > 0.1
    _, dx, dw = (many[0] for many in draws)
    np.testing.assert_allclose(seen, [relative(dw.T, X), 0, relative(dx.T, W), 0], rtol=1e-4)
    # With dL/dy the unit matrix the gradients are the rounded operands, turned back.
    for y, dx, dw in (*zip(*(many[:2] for many in draws)), unseeded, to_nearest):
        w, x = turned(dx), turned(dw.T)
        assert relative(y, x @ w.T) < 1e-5
        for values, exact in ((x, X), (w, W.T)):
            amax = np.abs(turned(exact)).max(1, keepdims=True)
            codes = values * 0.75 / 2 ** (np.floor(np.log2(amax)) - 2)
            grid = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
            assert np.abs(np.abs(codes)[..., None] - grid).min(-1).max() < 1e-4
    assert relative(turned(to_nearest[1]), nearest(turned(W.T.astype(np.float64)))) < 1e-5


def test_experts_take_the_variants():
    """QuEST's rule on gradients and a gain by a loop; stochastic forward rounding near the exact y."""
    sizes, w = (32, 0, 24), gaussian(3, O, I, seed=4)
    kinds = [
        recipes.Recipe(recipes.quartet(gradient=kind, signs=False).products) for kind in BACKWARD
    ]
    stochastic = recipes.quartet(forward="stochastic", backward="none")

    @jax.jit
    def run(x, w, e):
        def product(x, recipe):
            given = dict(recipe=recipe, seed=SEED, backend="xla")
            return grouped.quantized_grouped_matmul(x, w, jnp.array(sizes), **given)

        gradients = [jax.vjp(lambda x, r=recipe: product(x, r), x)[1](e)[0] for recipe in kinds]
        return gradients, product(x, stochastic)

    gradients, y = run(E, w, X)
    start = 0
    for size, matrix in zip(sizes, w.astype(np.float64)):
        rows = slice(start, start + size)
        start += size
        if size:
            for dx, rounded in zip(gradients, BACKWARD.values()):
                want = rounded(turned(X[rows].astype(np.float64))) @ rounded(turned(matrix)).T
                assert relative(dx[rows], want) < 1e-5
            assert 0.1 < relative(y[rows], E[rows] @ matrix) < 0.4


class Block(nnx.Module):
    def __init__(self, recipe):
        self.up = linear.Linear(I, O, axes=("embed", "ffn"), rngs=nnx.Rngs(0))
        quantizer.attach(self, {"up": recipe})


def test_layers_hand_their_words_to_the_forward_pass():
    recipe = recipes.quartet(forward="stochastic", backward="none")
    block = nnx.eval_shape(lambda: Block(recipe))
    graphdef = nnx.graphdef(block)

    @jax.jit
    def run(keys):
        def one(key):
            layer = nnx.merge(graphdef, nnx.State({"up": {"kernel": nnx.Param(W)}}))
            quantizer.prepare(layer, Context(key=key))
            return layer.up(X)

        return jax.lax.map(one, keys)

    first, again, other = run(jax.random.split(jax.random.key(0), 2)[jnp.array([0, 0, 1])])
    np.testing.assert_array_equal(first, again)
    assert 0.1 < relative(first, other) < 0.6
