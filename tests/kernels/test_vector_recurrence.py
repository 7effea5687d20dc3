"""The elementwise recurrence: golden files, loops, gradients, documents, extremes."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effarch.kernels import vector_recurrence
from effarch.kernels.vector_recurrence import xla

DATA = Path(__file__).parents[1] / "data"
BACKENDS = ["reference", "xla"]
B, T, D = 2, 150, 5  # three pieces on accelerators, the last one filled up

# Padding in front, between and behind, documents of one token, a boundary between pieces (64).
SEGMENTS = np.array(
    [[0] * 3 + [7] * 9 + [3] + [7] + [0] * 2 + [4] * 48 + [2] * 60 + [0] * 26, [5] * 140 + [6] * 10]
)
ONE_DOCUMENT = np.ones_like(SEGMENTS)


def relative_rms(actual, expected) -> float:
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    return np.sqrt(np.mean((actual - expected) ** 2)) / np.sqrt(np.mean(expected**2))


def make_inputs(dtype=np.float64):
    rng = np.random.default_rng(0)
    x, state = rng.standard_normal((B, T, D)), rng.standard_normal((B, D))
    g = -np.exp(rng.standard_normal((B, T, D)) - 1.5)
    return tuple(a.astype(dtype) for a in (x, g, state))


def by_loops(x, g, state, segments):
    h, state = np.zeros_like(x), state.copy()
    for row in range(len(x)):
        document = 0
        for t in range(x.shape[1]):
            segment = segments[row, t]
            if segment:
                if document not in (0, segment):
                    state[row] = 0
                document = segment
                state[row] = np.exp(g[row, t]) * state[row] + x[row, t]
                h[row, t] = state[row]
    return h, state


@functools.partial(jax.jit, static_argnames=("backend",))
def forward_backward(x, g, state, segments, *, backend="xla"):
    def run(x, g, state):
        return vector_recurrence(x, g, initial_state=state, segment_ids=segments, backend=backend)

    outputs, pull = jax.vjp(run, x, g, state)
    waves = [np.cos(1.7 * np.arange(a.size) ** 1.1).astype(a.dtype) for a in outputs]
    return outputs, pull(tuple(w.reshape(a.shape) for w, a in zip(waves, outputs)))


def assert_close(actual, expected, bound):
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert relative_rms(a, b) <= bound


@pytest.mark.smoke
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["hgrn_0", "hgrn_1"])
def test_golden_outputs(name, backend):
    data = np.load(DATA / f"{name}.npz")
    h, final = jax.jit(functools.partial(vector_recurrence, backend=backend))(data["x"], data["g"])
    assert h.dtype == final.dtype == jnp.float32
    assert relative_rms(h, data["o"]) <= 1e-5
    assert relative_rms(final, data["final_state"]) <= 1e-5


def test_values_equal_loops_and_gradients_equal_the_recurrence(float64):
    inputs = make_inputs()
    expected = forward_backward(*inputs, SEGMENTS, backend="reference")
    actual = forward_backward(*inputs, SEGMENTS)
    assert_close(actual[0], by_loops(*inputs, SEGMENTS), 1e-13)
    assert_close(actual, expected, 1e-13)
    padding = SEGMENTS == 0
    assert np.all(np.asarray(actual[0][0])[padding] == 0)
    assert all(np.all(np.asarray(gradient)[padding] == 0) for gradient in actual[1][:2])


def test_pieces_of_accelerators_equal_the_order_of_tokens(float64):
    x, g, state = make_inputs()
    ways = jax.jit(xla._in_pieces), jax.jit(xla._in_order)
    in_pieces, in_order = (way(x, np.exp(g), state) for way in ways)
    assert_close(in_pieces, in_order, 1e-13)
    assert_close(in_order, by_loops(x, g, state, ONE_DOCUMENT)[0], 1e-13)


@pytest.mark.parametrize("backend", BACKENDS)
def test_padding_content_is_ignored_and_a_row_of_padding_keeps_its_state(float64, backend):
    x, g, state = make_inputs()
    segments = SEGMENTS * [[1], [0]]
    padding = (segments == 0)[..., None]
    expected = forward_backward(x, g, state, segments, backend=backend)
    spoilt = np.where(padding, 99.0, x), np.where(padding, -99.0, g)
    assert_close(forward_backward(*spoilt, state, segments, backend=backend), expected, 0)
    np.testing.assert_array_equal(expected[0][1][1], state[1])


def test_a_row_of_one_document_without_segment_ids(float64):
    inputs = make_inputs()
    actual = forward_backward(*inputs, None)
    assert_close(actual[0], by_loops(*inputs, ONE_DOCUMENT), 1e-13)
    assert_close(actual, forward_backward(*inputs, ONE_DOCUMENT, backend="reference"), 1e-13)
    head, tail = ([a[:, part] for a in inputs[:2]] for part in (np.s_[:75], np.s_[75:]))
    run = jax.jit(lambda x, g, state: vector_recurrence(x, g, initial_state=state))
    h_head, middle = run(*head, inputs[2])
    h_tail, final = run(*tail, middle)
    assert_close((np.concatenate([h_head, h_tail], 1), final), actual[0], 1e-13)


def test_extreme_gates():
    x, g, state = make_inputs(np.float32)
    mixed = np.random.default_rng(1).choice([0.0, -0.01, -1.0, -20.0, -1e4], size=g.shape)
    for strong in (mixed, np.full(g.shape, -20.0), np.full(g.shape, -1e4), np.zeros(g.shape)):
        actual = forward_backward(x, strong.astype(np.float32), state, SEGMENTS)
        assert all(np.all(np.isfinite(a)) for a in jax.tree.leaves(actual))
        with jax.enable_x64(True):
            wide = (np.float64(x), strong, np.float64(state))
            expected = forward_backward(*wide, SEGMENTS, backend="reference")
        for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
            if np.any(b):
                assert relative_rms(a, b) <= 1e-6
            else:  # nothing survives one token
                assert not np.any(a)


def test_inside_shard_map_and_in_bfloat16():
    x, g, _ = make_inputs(np.float32)
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows, copy = jax.sharding.PartitionSpec("data"), jax.sharding.PartitionSpec()
    specs = dict(mesh=mesh, in_specs=(rows, copy), out_specs=rows)

    def gradients(run):
        return jax.jit(jax.grad(lambda *a: jnp.sum(jnp.sin(run(*a)[0])), argnums=(0, 1)))(x, g)

    expected = gradients(functools.partial(vector_recurrence, backend="reference"))
    assert_close(gradients(jax.shard_map(vector_recurrence, **specs)), expected, 1e-5)
    h, final = jax.jit(vector_recurrence)(x.astype(jnp.bfloat16), g)
    assert h.dtype == jnp.bfloat16 and final.dtype == jnp.float32
    wide = np.float64(x.astype(jnp.bfloat16)), g, np.zeros((B, D))
    assert_close(final, by_loops(*wide, ONE_DOCUMENT)[1], 1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(g=jnp.zeros((1, 3, 4))), r"g has shape \(1, 3, 4\).*\(1, 3, 2\)"),
        (dict(x=jnp.zeros((3, 2))), r"x has shape \(3, 2\)"),
        (dict(g=jnp.zeros((1, 3, 2), int)), "g has dtype int32"),
        (dict(initial_state=jnp.zeros((1, 3))), r"initial_state has shape.*\(1, 2\)"),
        (dict(segment_ids=jnp.ones((1, 3))), "segment_ids has dtype float32"),
        (dict(backend="cuda"), "backend 'cuda' does not exist"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    inputs = dict(x=jnp.zeros((1, 3, 2)), g=jnp.zeros((1, 3, 2)))
    with pytest.raises(ValueError, match=f"vector_recurrence: {message}"):
        vector_recurrence(**{**inputs, **change})
