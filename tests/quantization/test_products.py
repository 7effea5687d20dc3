"""The quantized product: each recipe's forward and gradients against numpy, and their statistics."""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from effarch import config as default
from effarch.quantization import estimators, matmul, recipes, rules

T, I, O = 64, 32, 64
SEED = np.array([1, 2], np.uint32)


def gaussian(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


X, W, E = gaussian(T, I), gaussian(I, O, seed=1) / 8, gaussian(T, O, seed=2)


@functools.partial(jax.jit, static_argnums=0)
def run(recipe, x, w, e, seed=None, **extra):
    """y, dx, dw."""

    def product(x, w):
        return matmul.quantized_matmul(x, w, recipe, dtype=jnp.float32, seed=seed, **extra)

    y, vjp = jax.vjp(product, x, w)
    return y, *vjp(e)


def close(got, want, tolerance=2e-6):
    assert np.linalg.norm(got - want) <= tolerance * np.linalg.norm(want)


def relative(got, want):
    return np.linalg.norm(got - want) / np.linalg.norm(want)


def e4m3(x, scale):
    return np.clip(x / scale, -448, 448).astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * scale


def e5m2(x, scale):
    q = np.clip(x / scale, -57344, 57344).astype(ml_dtypes.float8_e5m2)
    return q.astype(np.float32) * scale


def mx(x, axis, cast, largest, mode):
    """MX blocks of 32 along an axis by a loop."""
    rows = np.moveaxis(x, axis, -1)
    out = np.zeros_like(rows)
    for index in np.ndindex(rows.shape[0], rows.shape[1] // 32):
        part = slice(index[1] * 32, index[1] * 32 + 32)
        amax = np.abs(rows[index[0], part]).max()
        if mode == "ceil":
            scale = np.exp2(np.ceil(np.log2(amax / largest)))
        else:
            scale = np.exp2(np.floor(np.log2(amax)) - np.floor(np.log2(largest)))
        cut = np.clip(rows[index[0], part] / scale, -largest, largest)
        out[index[0], part] = cut.astype(cast).astype(np.float32) * scale
    return np.moveaxis(out, -1, axis)


def test_no_rounding_is_the_plain_product():
    y, dx, dw = run(recipes.Recipe(), X, W, E)
    close(y, X @ W)
    close(dx, E @ W.T)
    close(dw, X.T @ E)


def test_fp8_current_by_casts():
    amax = {name: np.abs(array).max() for name, array in (("x", X), ("w", W), ("e", E))}
    x, w = e4m3(X, amax["x"] / 448), e4m3(W, amax["w"] / 448)
    e = e5m2(E, amax["e"] / 57344)
    y, dx, dw = run(recipes.fp8_current(), X, W, E)
    close(y, x @ w)
    close(dx, e @ w.T)
    close(dw, x.T @ e)


def test_fp8_delayed_takes_the_given_magnitudes_and_reports_the_true_ones():
    """Too small a magnitude clips; 0 means a scale of 1."""
    amax = np.array([0.5, 0.0, 8.0], np.float32)

    @jax.jit
    def both(x, w, e, probe):
        def product(x, w, probe):
            recipe = recipes.fp8_delayed(history=4)
            return matmul.quantized_matmul(
                x, w, recipe, dtype=jnp.float32, amax=jnp.asarray(amax), probe=probe
            )

        y, vjp = jax.vjp(product, x, w, probe)
        return y, *vjp(e)

    y, dx, dw, seen = both(X, W, E, jnp.zeros(3))
    x, w, e = e4m3(X, np.float32(0.5 / 448)), e4m3(W, 1.0), e5m2(E, np.float32(8 / 57344))
    close(y, x @ w)
    close(dx, e @ w.T)
    close(dw, x.T @ e)
    np.testing.assert_array_equal(seen, [np.abs(a).max() for a in (X, W, E)])


def test_deepseek_blocks_and_tiles_by_a_loop():
    def blocks(x, height, width):
        out = np.zeros_like(x)
        for i, j in np.ndindex(x.shape[0] // height, x.shape[1] // width):
            part = np.s_[i * height : (i + 1) * height, j * width : (j + 1) * width]
            out[part] = e4m3(x[part], np.abs(x[part]).max() / 448)
        return out

    y, dx, dw = run(recipes.fp8_block(block_size=32), X, W, E)
    w = blocks(W, 32, 32)
    close(y, blocks(X, 1, 32) @ w)
    close(dx, blocks(E, 1, 32) @ w.T)
    close(dw, blocks(X, 32, 1).T @ blocks(E, 32, 1))


def test_mx_recipes_round_each_operand_along_its_contraction():
    for kind, cast, largest, mode in (
        ("mxfp8", ml_dtypes.float8_e4m3fn, 448, "ceil"),
        ("mxfp4", ml_dtypes.float4_e2m1fn, 6, "floor"),
    ):
        q = functools.partial(mx, cast=cast, largest=largest, mode=mode)
        y, dx, dw = run(recipes.build(kind), X, W, E)
        close(y, q(X, 1) @ q(W, 0))
        close(dx, q(E, 1) @ q(W, 1).T)
        close(dw, q(X, 0).T @ q(E, 0))


@pytest.mark.parametrize("kind", ["fp8_current", "int8"])
def test_native_products_equal_fake_ones_bit_for_bit(kind):
    fake = run(recipes.build(kind), X, W, E)
    native = run(recipes.build(kind, native=True), X, W, E)
    text = run.lower(recipes.build(kind, native=True), X, W, E).as_text()
    assert {"fp8_current": "f8E4M3FN", "int8": "xi8>"}[kind] in text
    for one, other in zip(fake, native):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("kind", ["mxfp8", "nvfp4"])
def test_native_blocks_are_the_values_of_fake_ones(kind):
    """Here the codes and scales are taken apart again: they must be the fake product's values."""
    given = {"stochastic": False} if kind == "nvfp4" else {}
    fake = run(recipes.build(kind, **given), X, W, E, SEED)
    native = run(recipes.build(kind, native=True, **given), X, W, E, SEED)
    text = run.lower(recipes.build(kind, native=True, **given), X, W, E, SEED).as_text()
    assert {"mxfp8": "f8E8M0FNU", "nvfp4": "f4E2M1FN"}[kind] in text
    for one, other in zip(fake, native):
        close(one, other)  # equal values; the order of a float32 sum follows the layout


def _mesh_of(device):
    return types.SimpleNamespace(devices=np.array([device], object))


def test_native_blocks_need_a_machine_that_has_them():
    config = default.default()
    config.quantization.recipe, config.quantization.native = "nvfp4", True
    with pytest.raises(ValueError, match="'nvfp4' needs block-scaled matrix products, which 'cpu'"):
        rules.check_device(config.quantization, _mesh_of(jax.devices()[0]))
    blackwell = type("Device", (), {"device_kind": "NVIDIA B200"})()
    rules.check_device(config.quantization, _mesh_of(blackwell))
    config.quantization.recipe = "fp8_current"
    rules.check_device(config.quantization, _mesh_of(jax.devices()[0]))
    with pytest.raises(ValueError, match="'mxfp4' has no product that runs"):
        recipes.build("mxfp4", native=True)


def test_int8_rounds_rows_and_leaves_the_weight_gradient():
    def rows(x, axis):
        scale = np.abs(x).max(axis, keepdims=True) / np.float32(127)
        return np.round(x / scale) * scale

    y, dx, dw = run(recipes.int8(), X, W, E)
    close(y, rows(X, 1) @ rows(W, 0))
    close(dx, rows(E, 1) @ rows(W, 1).T)
    close(dw, X.T @ E)


def gradient_draws(recipe, number):
    @jax.jit
    def draw(x, w, e, seeds):
        def product(x, w, seed):
            return matmul.quantized_matmul(x, w, recipe, dtype=jnp.float32, seed=seed)

        def one(seed):
            return jax.vjp(functools.partial(product, seed=seed), x, w)[1](e)

        return jax.lax.map(one, seeds)

    seeds = jax.random.bits(jax.random.key(0), (number, 2), jnp.uint32)
    return draw(X, W, E, seeds)


@pytest.mark.parametrize("kind", ["quartet", "nvfp4"])
def test_stochastic_gradients_are_unbiased_and_average_as_the_root_of_the_draws(kind):
    """Around the gradient without backward rounding, masks and nearest-rounded operands included."""
    recipe = recipes.build(kind)
    exact = {"quartet": recipes.quartet(backward="none"), "nvfp4": None}[kind]
    dx_all, dw_all = map(np.asarray, gradient_draws(recipe, 400))
    if kind == "quartet":
        _, dx, dw = run(exact, X, W, E)
    else:  # dx is exact but for w's tiles; dw rounds a rotated x to nearest, with a bias of its own
        tiles = dataclasses.replace(recipe.products, dx_e=None, dw_e=None, dw_x=None)
        _, dx, dw = run(recipes.Recipe(tiles), X, W, E)
    one, mean = relative(dx_all[0], dx), relative(dx_all.mean(0), dx)
    assert 0.1 < one < 0.4
    assert mean < 1.25 * one / 20
    if kind == "quartet":
        assert relative(dw_all.mean(0), dw) < 1.25 * relative(dw_all[0], dw) / 20
    else:
        assert relative(dw_all.mean(0), dw) < 0.03
    assert relative(dx_all[0], dx_all[1]) > 0.1


def test_dropping_the_rotation_of_one_operand_destroys_the_gradient():
    recipe = recipes.quartet()
    operand = dataclasses.replace(recipe.products.dx_w, rotate=0)
    broken = dataclasses.replace(
        recipe, products=dataclasses.replace(recipe.products, dx_w=operand)
    )
    _, dx, _ = run(recipes.quartet(backward="none"), X, W, E)
    assert relative(run(broken, X, W, E, SEED)[1], dx) > 0.9
    assert relative(run(recipe, X, W, E, SEED)[1], dx) < 0.5


def test_a_block_of_zeros_gives_zeros():
    x, e = X.copy(), E.copy()
    x[:32], e[:, :32] = 0, 0
    for kind in ("quartet", "nvfp4", "mxfp4"):
        outputs = run(recipes.build(kind), x, W, e, SEED)
        assert all(np.isfinite(output).all() for output in outputs)
        np.testing.assert_array_equal(outputs[0][:32], 0)


def sylvester(size):
    return np.array(
        [[(-1) ** (i & j).bit_count() for j in range(size)] for i in range(size)]
    ) / np.sqrt(size)


def test_quartet_forward_by_a_loop():
    h = sylvester(32)

    def project(x):
        out = np.zeros_like(x)
        for row, block in enumerate(x @ h):
            unit = 2.92247856 / 6 * block.std() + 1e-8
            unit = 2.0 ** round(np.log2(unit))
            values = np.clip(block / unit, -6, 6).astype(ml_dtypes.float4_e2m1fn)
            out[row] = values.astype(np.float32) * unit
        return out

    y = run(recipes.quartet(backward="none"), X, W, E)[0]
    close(y, project(X) @ project(W.T).T, 1e-5)
    assert relative(y, X @ W) < 0.25


def test_projection_errors_of_gaussian_blocks_are_the_tabled_ones():
    """MSE / variance and share of masked entries, std of the blocks log-uniform in [1, 2)."""
    std = np.exp2(np.random.default_rng(1).uniform(0, 1, (40_000, 1))).astype(np.float32)
    x = gaussian(40_000, 32) * std

    @functools.partial(jax.jit, static_argnums=2)
    def error(x, std, mode):
        values, mask = estimators.Quartet(0, mode)(x, 1)
        return jnp.mean(((values - x) / std) ** 2), 1 - jnp.mean(mask)

    for mode, want, masked in (
        ("floor", 2.235e-2, 0.054),
        ("nearest", 1.336e-2, 0.008),
        ("none", 1.236e-2, None),
    ):
        got, share = error(x, std, mode)
        np.testing.assert_allclose(got, want, rtol=0.02)
        if masked:
            np.testing.assert_allclose(share, masked, rtol=0.1)


def test_quest_alpha_minimises_the_gaussian_error():
    """The closed-form error of 2^b levels on N(0, 1), by integration over a fine grid."""
    z = np.linspace(-9, 9, 200_001)
    density = np.exp(-z * z / 2) / np.sqrt(2 * np.pi) * (z[1] - z[0])
    tabled = {1: 0.3633802, 2: 0.1188461, 3: 0.0374397, 4: 0.0115429, 6: 0.00104005, 8: 8.78212e-5}

    def error(alpha, bits):
        step = 2 * alpha / (2**bits - 1)
        q = (np.round(np.clip(z, -alpha, alpha) / step + 0.5) - 0.5) * step
        return (density * (q - z) ** 2).sum()

    for bits, want in tabled.items():
        alpha = estimators.QUEST_ALPHA[bits]
        np.testing.assert_allclose(error(alpha, bits), want, atol=1e-6)
        for other in (alpha * 0.99, alpha * 1.01):
            # The published 8-bit constant lies 1 % below the minimum.
            assert bits == 8 or error(other, bits) > error(alpha, bits)


@pytest.mark.parametrize(("bits", "estimator"), [(1, "clip"), (4, "trust"), (0, "trust")])
def test_quest_by_its_formulas(bits, estimator):
    recipe = recipes.quest(bits=bits or 4, fp4=bits == 0, rotate=32, estimator=estimator)
    h = sylvester(32)

    def project(x):
        rows = x @ h
        rms = np.sqrt((rows**2).mean(1, keepdims=True))
        if bits == 0:
            unit = 0.48707948 * rms
            values = np.clip(rows / unit, -6, 6).astype(ml_dtypes.float4_e2m1fn)
            return values.astype(np.float32) * unit, np.abs(rows) <= 7 * unit
        end = estimators.QUEST_ALPHA[bits] * rms
        levels = np.linspace(-1, 1, 2**bits) * end[..., None]
        nearest = np.abs(levels - rows[..., None]).argmin(-1)
        values = np.take_along_axis(levels, nearest[..., None], -1)[..., 0]
        limit = end + end / (2**bits - 1) if estimator == "trust" else end
        return values, np.abs(rows) <= limit

    inputs = X.copy()
    inputs[3] += 8 * h[5]  # an outlier after the rotation
    (x, mask_x), (w, mask_w) = project(inputs.astype(np.float64)), project(W.T.astype(np.float64))
    y, dx, dw = run(recipe, inputs, W, E)
    close(y, x @ w.T, 1e-5)
    close(dx, (mask_x * (E @ w)) @ h, 1e-5)
    close(dw, ((mask_w * (E.T @ x)) @ h).T, 1e-5)
    assert mask_x.mean() < 1


def test_learned_steps_have_the_piecewise_gradient():
    bits, low, high = 3, -4, 3
    step = np.float32(0.4)

    @jax.jit
    def both(x, step, dy):
        y, vjp = jax.vjp(lambda x, step: estimators.learned_step(x, step, bits), x, step)
        return y, *vjp(dy)

    y, dx, d_step = both(X, step, E[:, :I])
    total = 0.0
    for u, g in zip((X / step).ravel(), E[:, :I].ravel()):
        slope = low if u < low else high if u > high else np.round(u) - u
        total += g * slope
    inside = (X / step >= low) & (X / step <= high)
    np.testing.assert_array_equal(dx, np.where(inside, E[:, :I], 0))
    np.testing.assert_allclose(y, np.round(np.clip(X / step, low, high)) * step, rtol=1e-6)
    np.testing.assert_allclose(d_step, total / np.sqrt(X.size * high), rtol=1e-4)
    np.testing.assert_allclose(
        estimators.initial_step(jnp.asarray(X), bits), 2 * np.abs(X).mean() / np.sqrt(3), rtol=1e-5
    )


def test_statistical_weights_lie_on_half_integer_levels():
    bits, n = 2, 2
    w = np.asarray(jax.jit(lambda w: estimators.estimate(w, estimators.Stats(bits), 0))(W))
    scale = 2 * np.abs(W).mean(0)
    levels = np.array([2 * j + 1 for j in range(-n, n)]) / (2 * n)
    distance = np.abs(w[..., None] / scale[:, None] - levels).min(-1)
    assert distance.max() < 1e-5
    c = np.clip(W / scale, -1, 1)
    assert np.abs(w / scale - c).max() <= 1 / (2 * n) + 1e-5


@pytest.mark.parametrize("kind", sorted(set(recipes.KINDS) - {"none", "fp8_delayed", "lsq", "ofq"}))
def test_gradients_of_every_recipe_point_the_right_way(kind):
    """Cosine with the exact gradients; a repeat with the same seed is bit-equal."""
    options = dict(block_size=32) if kind == "fp8_block" else {}
    recipe = recipes.build(kind, **(dict(rotate=32) if kind == "quest" else options))
    got = run(recipe, X, W, E, SEED)
    for one, other in zip(got, run(recipe, X, W, E, SEED)):
        np.testing.assert_array_equal(one, other)
    for value, want in zip(got, (X @ W, E @ W.T, X.T @ E)):
        cosine = np.vdot(value, want) / np.linalg.norm(value) / np.linalg.norm(want)
        assert cosine > (0.93 if "4" in kind or kind in ("quartet", "quest") else 0.995)


def test_bad_recipes_are_refused_in_words():
    for call, words in (
        (lambda: recipes.build("fp9"), "quantization.recipe='fp9' is not known"),
        (lambda: recipes.build("quest", bit=4), "quantization.quest.bit is not an option"),
        (lambda: recipes.quest(bits=9), "quantization.quest.bits=9 must be 1 to 8"),
        (lambda: recipes.quartet(gradient="up"), "quantization.quartet.gradient='up'"),
        (lambda: recipes.build("mxfp6", native=True), "the recipe 'mxfp6' has no product"),
        (lambda: run(recipes.nvfp4(), X, W, E), "needs random numbers"),
    ):
        with pytest.raises(ValueError, match="quantization") as error:
            call()
        assert words in str(error.value)
