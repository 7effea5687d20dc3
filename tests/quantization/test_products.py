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
from effarch.kernels.quantize import formats
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
    if kind == "quartet":  # of a prototype apart from this code
        assert one == pytest.approx(0.236, rel=0.1)
        assert relative(dw_all[0], dw) == pytest.approx(0.237, rel=0.1)
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
    assert relative(run(broken, X, W, E, SEED)[1], dx) > 1
    assert relative(run(recipe, X, W, E, SEED)[1], dx) < 0.5


def test_rotations_alone_leave_the_gradient():
    """Both operands of dw in a format of 17 bits: what is left of the transform is its rounding."""
    wide = formats.Format(formats.Float("wide", 5, 16, 15, 2.0**15))
    recipe = recipes.nvfp4()
    rotated = dataclasses.replace(recipe.products.dw_x, format=wide)
    products = dataclasses.replace(recipe.products, y_x=None, y_w=None, dx_e=None, dx_w=None)
    both = dataclasses.replace(products, dw_x=rotated, dw_e=rotated)
    assert relative(run(recipes.Recipe(both), X, W, E, SEED)[2], X.T @ E) < 1e-4
    plain = dataclasses.replace(both, dw_e=dataclasses.replace(rotated, rotate=0))
    assert relative(run(recipes.Recipe(plain), X, W, E, SEED)[2], X.T @ E) > 1


@pytest.mark.slow  # quick, but only the newest JAX has it on a CPU: that of the smoke subset
@pytest.mark.smoke
def test_mxfp8_is_that_of_jax():
    """`jax.nn.scaled_dot_general`, forward and both gradients: E4M3, scales rounded up."""
    config = jax.nn.get_scaled_dot_general_config("mxfp8")

    @jax.jit
    def theirs(x, w, e):
        def product(x, w):
            dims = (((1,), (0,)), ((), ()))
            return jax.nn.scaled_dot_general(
                x, w, dims, preferred_element_type=jnp.float32, configs=[config] * 3
            )

        y, vjp = jax.vjp(product, x, w)
        return y, *vjp(e)

    try:
        want = theirs(X, W, E)
    except NotImplementedError:
        pytest.skip("this JAX has scaled products for GPUs alone")
    for one, other in zip(run(recipes.mxfp8(), X, W, E), want):
        close(one, other, 1e-5)


@pytest.mark.parametrize("short", [(48, I, O), (T, 48, O), (T, I, 48)])
def test_sizes_that_blocks_do_not_divide_are_refused(short):
    t, i, o = short
    shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((t, i), (i, o), (t, o))]
    with pytest.raises(ValueError, match="blocks of 32"):
        run.eval_shape(recipes.mxfp8(), *shapes)


def test_rematerialization_rounds_alike():
    """Up to the order of the sums, which a CPU may choose twice; a number rounded otherwise is 1e-2."""
    recipe = recipes.quartet()

    @jax.jit
    def twice(x, w, e):
        def product(x, w):
            y = jnp.tanh(x)
            return matmul.quantized_matmul(y, w, recipe, dtype=jnp.float32, seed=SEED)

        return [jax.vjp(f, x, w)[1](e) for f in (product, jax.checkpoint(product))]

    for one, other in zip(*twice(X, W, E)):
        close(one, other, 1e-5)


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
    assert relative(y, X @ W) == pytest.approx(0.166, rel=0.1)


@pytest.mark.parametrize(
    ("bits", "estimator"), [(1, "clip"), (2, "trust"), (4, "trust"), (0, "trust")]
)
def test_quest_by_its_formulas(bits, estimator):
    recipe = recipes.quest(bits=bits or 4, fp4=bits == 0, rotate=32, estimator=estimator)
    h = sylvester(32)

    def project(x):
        rows = x @ h
        rms = np.sqrt((rows**2).mean(1, keepdims=True))
        if bits == 0:
            unit = 0.48707948 * rms
            values = np.clip(rows / unit, -6, 6).astype(ml_dtypes.float4_e2m1fn)
            values = values.astype(np.float64) * unit
            return values, np.abs(values - rows) <= unit
        end = estimators.QUEST_ALPHA[bits] * rms
        levels = np.linspace(-1, 1, 2**bits) * end[..., None]
        nearest = np.abs(levels - rows[..., None]).argmin(-1)
        values = np.take_along_axis(levels, nearest[..., None], -1)[..., 0]
        if estimator == "clip":
            return values, np.abs(rows) <= end
        return values, np.abs(values - rows) <= end / (2**bits - 1) * (1 + 1e-9)

    inputs = X.copy()
    inputs[3] += 8 * h[5]  # an outlier after the rotation
    (x, mask_x), (w, mask_w) = project(inputs.astype(np.float64)), project(W.T.astype(np.float64))
    y, dx, dw = run(recipe, inputs, W, E)
    close(y, x @ w.T, 1e-5)
    close(dx, (mask_x * (E @ w)) @ h, 1e-5)
    close(dw, ((mask_w * (E.T @ x)) @ h).T, 1e-5)
    assert mask_x.mean() < 1


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
        (lambda: recipes.quartet(forward="up"), "quantization.quartet.forward='up'"),
        (lambda: recipes.build("mxfp6", native=True), "the recipe 'mxfp6' has no product"),
        (lambda: run(recipes.nvfp4(), X, W, E), "needs random numbers"),
    ):
        with pytest.raises(ValueError, match="quantization") as error:
            call()
        assert words in str(error.value)
