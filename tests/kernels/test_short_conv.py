"""The short convolution: shifted products against explicit windows, documents, tails, gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effarch.kernels import short_conv

B, T, D, W = 3, 23, 5, 4
BACKENDS = ["reference", "xla"]

# Padding in front, between and behind; documents of 1 and 2 tokens; a row of padding only.
SEGMENTS = np.array(
    [
        [0, 0] + [3] * 6 + [8] + [3] * 2 + [0] * 3 + [5] * 7 + [0] * 2,
        [1] * 21 + [2] * 2,
        [0] * T,
    ]
)


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def make_inputs():
    rng = np.random.default_rng(0)
    shapes = dict(x=(B, T, D), kernel=(W, D), bias=(D,), initial=(B, W - 1, D))
    return {name: rng.standard_normal(shape) for name, shape in shapes.items()}


def by_windows(x, kernel, bias, initial, segments, activation):
    """One output at a time in NumPy: the document so far, put behind `initial` or zeros."""
    x, kernel, bias, initial = (np.asarray(array) for array in (x, kernel, bias, initial))
    y, tail = np.zeros(x.shape), np.array(initial)
    for row in range(x.shape[0]):
        past, document = list(initial[row]), None
        for t, segment in enumerate(segments[row]):
            if segment == 0:
                continue
            if document is not None and segment != document:
                past = [np.zeros(D)] * (W - 1)
            document = segment
            past.append(x[row, t])
            y[row, t] = sum(kernel[j] * past[len(past) - W + j] for j in range(W)) + bias
            if activation == "silu":
                y[row, t] /= 1 + np.exp(-y[row, t])
        tail[row] = past[-(W - 1) :]
    return y, tail


@functools.partial(jax.jit, static_argnames=("activation", "backend"))
def run(inputs, segments=None, *, activation="silu", backend="xla"):
    return short_conv(**inputs, segment_ids=segments, activation=activation, backend=backend)


@functools.partial(jax.jit, static_argnames=("backend",))
def gradients(inputs, segments=None, *, backend="xla"):
    outputs, pull = jax.vjp(
        lambda inputs: short_conv(**inputs, segment_ids=segments, backend=backend), inputs
    )
    return pull(tuple(np.cos(np.arange(x.size) ** 1.1).reshape(x.shape) for x in outputs))[0]


@pytest.mark.parametrize("segments", [None, SEGMENTS], ids=["one", "packed"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_outputs_and_tail_equal_explicit_windows(backend, segments):
    inputs = make_inputs()
    known = np.ones((B, T), int) if segments is None else segments
    for activation in ("silu", None):
        actual = run(inputs, segments, activation=activation, backend=backend)
        expected = by_windows(**inputs, segments=known, activation=activation)
        for a, b in zip(actual, expected):
            np.testing.assert_allclose(a, b, atol=1e-13)


@pytest.mark.parametrize("segments", [None, SEGMENTS], ids=["one", "packed"])
def test_gradients_equal_autodiff_of_the_reference(segments):
    inputs = make_inputs()
    actual = gradients(inputs, segments)
    expected = gradients(inputs, segments, backend="reference")
    for name in inputs:
        np.testing.assert_allclose(actual[name], expected[name], atol=1e-12, err_msg=name)


def test_bias_and_initial_default_to_zero():
    inputs = make_inputs()
    bare = dict(x=inputs["x"], kernel=inputs["kernel"])
    zeros = {name: np.zeros_like(inputs[name]) for name in ("bias", "initial")}
    for a, b in zip(run(bare, SEGMENTS), run(bare | zeros, SEGMENTS)):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("cut", [1, 2, 20])
def test_the_tail_continues_a_row(cut):
    inputs = make_inputs()
    y, tail = run(inputs)
    y_head, middle = run({**inputs, "x": inputs["x"][:, :cut]})
    y_tail, end = run({**inputs, "x": inputs["x"][:, cut:], "initial": middle})
    np.testing.assert_allclose(np.concatenate([y_head, y_tail], axis=1), y, atol=1e-13)
    np.testing.assert_array_equal(end, tail)


def test_trailing_padding_changes_neither_tail_nor_outputs():
    inputs = make_inputs()
    y, tail = run(inputs)
    longer = {**inputs, "x": np.pad(inputs["x"], ((0, 0), (0, 4), (0, 0)), constant_values=9.0)}
    segments = np.pad(np.ones((B, T), int), ((0, 0), (0, 4)))
    y_longer, tail_longer = jax.tree.map(np.asarray, run(longer, segments))
    np.testing.assert_allclose(y_longer[:, :T], y, atol=1e-13)
    assert np.all(y_longer[:, T:] == 0)
    np.testing.assert_array_equal(tail_longer, tail)


def test_one_tap_is_a_product():
    inputs = make_inputs()
    one = dict(x=inputs["x"], kernel=inputs["kernel"][:1])
    y, tail = run(one, SEGMENTS, activation=None)
    np.testing.assert_array_equal(y, inputs["x"] * inputs["kernel"][0] * (SEGMENTS != 0)[..., None])
    assert tail.shape == (B, 0, D)


def test_bfloat16_is_computed_in_float32():
    inputs = {name: x.astype(jnp.bfloat16) for name, x in make_inputs().items()}
    y, tail = run(inputs)
    wide, _ = run({name: x.astype(jnp.float32) for name, x in inputs.items()})
    assert y.dtype == tail.dtype == jnp.bfloat16
    np.testing.assert_array_equal(y, wide.astype(jnp.bfloat16))


def test_vmap_equals_a_loop():
    inputs = make_inputs()
    stacked = jax.tree.map(lambda x: np.stack([x, 2 * x]), inputs)
    y, tail = jax.jit(jax.vmap(lambda inputs: short_conv(**inputs, segment_ids=SEGMENTS)))(stacked)
    for index in range(2):
        y_one, tail_one = run(jax.tree.map(lambda x, i=index: x[i], stacked), SEGMENTS)
        np.testing.assert_allclose(y[index], y_one, atol=1e-13)
        np.testing.assert_array_equal(tail[index], tail_one)


@pytest.mark.slow
@pytest.mark.ci
def test_inside_shard_map():
    """Manual over a mesh axis with checks on; kernel and bias replicated, rows split."""
    inputs = make_inputs()
    inputs.pop("initial")
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows, copy = jax.sharding.PartitionSpec("data"), jax.sharding.PartitionSpec()
    specs = ({"x": rows, "kernel": copy, "bias": copy}, rows)

    def plain(inputs, segments, backend):
        return short_conv(**inputs, segment_ids=segments, backend=backend)

    def sharded(inputs, segments, backend):
        rule = functools.partial(plain, backend=backend)
        return jax.shard_map(rule, mesh=mesh, in_specs=specs, out_specs=rows)(inputs, segments)

    def gradients(run, backend):
        def loss(inputs):
            return sum(jnp.sum(jnp.sin(x)) for x in run(inputs, SEGMENTS, backend))

        return jax.jit(jax.grad(loss))(inputs)

    expected = gradients(plain, "reference")
    for backend in BACKENDS:
        actual = gradients(sharded, backend)
        for name in inputs:
            np.testing.assert_allclose(actual[name], expected[name], atol=1e-12, err_msg=name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(x=jnp.zeros((2, 3))), r"x has shape \(2, 3\)"),
        (dict(kernel=jnp.zeros((4, 2))), r"kernel has shape \(4, 2\); give \[taps, 3\]"),
        (dict(bias=jnp.zeros(4)), r"bias has shape \(4,\).*\(3,\)"),
        (dict(initial=jnp.zeros((2, 4, 3))), r"initial has shape.*\(2, 3, 3\)"),
        (dict(segment_ids=jnp.ones((2, 6), int)), r"segment_ids has shape.*\(2, 5\)"),
        (dict(segment_ids=jnp.ones((2, 5))), "segment_ids has dtype"),
        (dict(activation="relu"), "activation 'relu' does not exist"),
        (dict(backend="cuda"), "backend 'cuda' does not exist"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        short_conv(**{**dict(x=jnp.zeros((2, 5, 3)), kernel=jnp.zeros((4, 3))), **change})
