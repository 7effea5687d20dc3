"""Optimizers whose moments take few bits: COAT and 8-bit Adam."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest

from effarch.kernels.coat import groups
from effarch.models import parameters
from effarch.training import checkpoints, optimizers
from effarch.training.optimizers import adam8bit, state_paths


@functools.partial(jax.jit, static_argnums=1)
def coat_round_trip(x, expand):
    codes, shared = groups.encode(x, expand)
    return groups.decode(codes, shared), codes, shared


def test_coat_equals_the_published_form_with_its_centre_and_scale():
    """Group by group in float64: y = sign(x) (|x| / c)^k, scale = (hi / c)^k / 448."""
    x = np.random.default_rng(0).standard_normal((16, 128)).astype(np.float32)
    got = np.asarray(coat_round_trip(x, True)[0])
    for row, values in zip(got, x.astype(np.float64)):
        hi, lo = np.abs(values).max(), np.abs(values).min()
        centre = np.sqrt(hi * lo)
        k = np.floor(16 * np.log2(448 * 448 / 2) / np.log2(hi / lo)) / 16
        y, scale = np.sign(values) * (np.abs(values) / centre) ** k, (hi / centre) ** k / 448
        q = (y / scale).astype(np.float32).astype(ml_dtypes.float8_e4m3fn).astype(np.float64)
        want = np.sign(q) * (np.abs(q) * scale) ** (1 / k) * centre
        # float32 powers: a value on the edge of two codes may take either.
        assert np.mean(~np.isclose(row, want, rtol=1e-4)) < 0.01


def test_coat_keeps_the_largest_the_sign_zeros_and_equal_values():
    random = np.random.default_rng(1)
    x = np.exp(3 * random.standard_normal((8, 128))).astype(np.float32)
    x *= random.choice([-1, 1], x.shape)
    x[0], x[1], x[2, :64] = 0, 0.37, 0
    y, codes, _ = map(np.asarray, coat_round_trip(x, True))
    assert np.isfinite(y).all()
    np.testing.assert_array_equal(y[0], 0)
    np.testing.assert_array_equal(y[1], x[1])
    np.testing.assert_array_equal(np.abs(y).max(1), np.abs(x).max(1))
    np.testing.assert_array_equal(np.sign(y), np.sign(x))  # nothing but zeros becomes zero
    assert codes.dtype == ml_dtypes.float8_e4m3fn


@pytest.mark.parametrize(("kind", "gain"), [("log-normal", 1.8), ("gaussian", 1.5)])
def test_expansion_lowers_the_relative_error(kind, gain):
    x = np.random.default_rng(2).standard_normal((256, 128)).astype(np.float32)
    x = np.exp(x) if kind == "log-normal" else x
    error = [
        np.mean(np.abs(coat_round_trip(x, expand)[0] - x) / np.abs(x)) for expand in (False, True)
    ]
    assert error[0] > gain * error[1]


@pytest.mark.parametrize("is_signed", [True, False])
def test_eight_bit_levels_take_the_nearest(is_signed):
    levels = adam8bit.levels(is_signed=is_signed)
    assert len(levels) == len(set(levels)) == 256
    assert levels[-1] == 1 and 0 in levels and (levels[0] < -0.99 if is_signed else levels[0] == 0)
    x = np.random.default_rng(3).standard_normal((4, 64)).astype(np.float32) ** 3
    x = x if is_signed else np.abs(x)

    @jax.jit
    def run(x):
        codec = adam8bit.codec(levels, 64)
        return codec.decode(*codec.encode(x))

    amax = np.abs(x).max(1, keepdims=True)
    nearest = levels[np.abs(x[..., None] / amax[..., None] - levels).argmin(-1)] * amax
    np.testing.assert_allclose(run(x), nearest, rtol=1e-5)
    np.testing.assert_array_equal(run(jnp.zeros((4, 64))), 0)


SHAPES = {"layers/0/ffn/up/kernel": (2, 40, 200), "embed/table": (50, 40), "norm": (40,)}
LOGICAL = {3: ("layers", "embed", "ffn"), 2: ("vocab", "embed"), 1: ("norm",)}


def nested(flat):
    tree = {}
    for path, value in flat.items():
        *outer, last = path.split("/")
        place = functools.reduce(lambda node, name: node.setdefault(name, {}), outer, tree)
        place[last] = value
    return tree


def infos():
    return nested(
        {
            path: parameters.ParamInfo(path, (path,), LOGICAL[len(shape)], shape, len(shape) > 1)
            for path, shape in SHAPES.items()
        }
    )


def trained(kind, steps=200):
    """The losses of a quadratic with very different curvatures, and the optimizer's state."""
    random = np.random.default_rng(4)
    target = nested({path: random.standard_normal(shape) for path, shape in SHAPES.items()})
    curvature = nested({p: np.exp(2 * random.standard_normal(s)) for p, s in SHAPES.items()})
    tx = optimizers.build(kind, schedule=4e-3, clip_norm=0, infos=infos())

    def loss(params):
        terms = jax.tree.map(lambda p, t, c: jnp.mean(c * (p - t) ** 2), params, target, curvature)
        return sum(jax.tree.leaves(terms))

    def step(carry, _):
        params, state = carry
        value, grads = jax.value_and_grad(loss)(params)
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), value

    @jax.jit
    def run(params):
        (_, state), values = jax.lax.scan(step, (params, tx.init(params)), length=steps)
        return values, state

    values, state = run(jax.tree.map(lambda t: jnp.zeros(t.shape), target))
    return np.asarray(values), state


@pytest.mark.slow
@pytest.mark.ci
def test_small_states_train_as_float32_ones_do_in_fewer_bytes():
    want, full = trained("adamw")
    sizes = {"adamw": _bytes(full)}
    for kind in ("coat", "adam8bit"):
        losses, state = trained(kind)
        sizes[kind] = _bytes(state)
        assert want[-1] < want[0] / 2
        np.testing.assert_allclose(losses, want, rtol=0.02)
    count = sum(int(np.prod(shape)) for shape in SHAPES.values())
    assert sizes["adamw"] >= 8 * count
    # Groups of 128 along rows of 200 and 40: two and one a row, of 2 moments x 2 numbers x 4 bytes.
    rows = 2 * 80 + 50 + 1
    assert sizes["coat"] == 2 * count + rows * 16 + (sizes["adamw"] - 8 * count)
    matrix = 2 * 40 * 200
    assert sizes["adam8bit"] < 8 * (count - matrix) + 2 * matrix + 80 * 8 + 100


def _bytes(state):
    return sum(leaf.nbytes for leaf in jax.tree.leaves(state))


def test_checkpoints_keep_every_bit_of_fp8_moments(tmp_path):
    """All 256 codes among them: NaN, -0 and subnormal numbers."""
    tx = optimizers.build("coat", schedule=1e-3, clip_norm=0, infos=infos())
    random = np.random.default_rng(5)
    params = nested(
        {path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape in SHAPES.items()}
    )
    target = jax.eval_shape(tx.init, params)

    def of_any_bits(leaf):
        bits = random.bytes(leaf.size * leaf.dtype.itemsize)
        return jnp.asarray(np.frombuffer(bits, leaf.dtype).reshape(leaf.shape))

    want = jax.tree.map(of_any_bits, target)
    codes = [x for x in jax.tree.leaves(want) if x.dtype == jnp.float8_e4m3fn]
    assert len(codes) == 2 * len(SHAPES)
    assert len(set(np.asarray(codes[0]).tobytes())) == 256
    with checkpoints.Checkpoints(tmp_path, fingerprint="coat") as store:
        store.save(1, want, {})
    _, got, _ = checkpoints.Checkpoints(tmp_path, fingerprint="coat").restore(target)
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
        assert one.dtype == other.dtype and one.shape == other.shape
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()


def test_stored_moments_lie_where_their_parameter_does():
    """Codes like the parameter; what groups share like its other dimensions."""
    by_path = state_paths.by_path(infos())
    tx = optimizers.build("coat", schedule=1e-3, clip_norm=0, infos=infos())
    params = nested(
        {path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape in SHAPES.items()}
    )
    found = {}
    for key_path, leaf in jax.tree_util.tree_leaves_with_path(jax.eval_shape(tx.init, params)):
        path = parameters.path_of(key_path)
        found[path] = state_paths.logical_axes(path, leaf.shape, by_path)

    def of(ending):
        return {axes for path, axes in found.items() if path.endswith(ending)}

    assert of("codes/layers/0/ffn/up/kernel") == {("layers", "embed", "ffn")}
    assert of("shared/layers/0/ffn/up/kernel") == {("layers", "embed", None, None)}
    assert of("shared/norm") == {(None, None)}
    assert of("count") == {None}
