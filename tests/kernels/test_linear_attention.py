"""Linear attention: golden files, the chunked form, its gradient and the public contract.

Most comparisons run in float64, where the chunked form and a plain loop agree to 1e-12 and every wrong
factor shows. Shapes repeat on purpose: each new one costs a compilation.
"""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effarch.kernels import linear_attention, linear_attention_step
from effarch.kernels.chunked import rows

DATA = Path(__file__).parents[1] / "data"
BACKENDS = ["reference", "xla"]
GATES = ["none", "constant", "head", "channel"]
B, T, H, HV, K, V, CHUNK = 2, 78, 2, 4, 6, 5, 32
compiled = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

# Padding in front, between and behind (also a chunk of nothing else), documents of one token (also
# with an id that came before), a boundary on the edge of chunks (32), a document over two chunks.
SEGMENTS = np.array(
    [
        [0] * 2 + [7] * 5 + [3] + [7] + [0] * 3 + [4] * 20 + [2] * 20 + [1] + [9] * 5 + [0] * 20,
        [5] * 64 + [6] * 14,
    ]
)
ONE_DOCUMENT = np.ones_like(SEGMENTS)


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


def relative_rms(actual, expected) -> float:
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    return np.sqrt(np.mean((actual - expected) ** 2)) / np.sqrt(np.mean(expected**2))


def make_inputs(gate, dtype=np.float64, length=T, seed=0):
    """q, k, v, g and an initial state."""
    rng = np.random.default_rng(seed)
    q, k = rng.standard_normal((2, B, length, H, K))
    v = rng.standard_normal((B, length, HV, V))
    shape = dict(constant=(HV,), head=(B, length, HV), channel=(B, length, HV, K)).get(gate)
    g = None if shape is None else -np.exp(rng.standard_normal(shape) - 1.5)
    arrays = (q, k, v, g, rng.standard_normal((B, HV, K, V)))
    return tuple(None if x is None else x.astype(dtype) for x in arrays)


def by_loops(q, k, v, g, state, segments):
    """The definition in NumPy, one row, token and head at a time."""
    g = np.zeros(HV) if g is None else g
    g = g if g.ndim > 1 else np.broadcast_to(g, v.shape[:3])
    o, state = np.zeros_like(v), state.copy()
    for row in range(len(v)):
        document = 0
        for t in range(v.shape[1]):
            segment = segments[row, t]
            if segment == 0:
                continue
            if document not in (0, segment):
                state[row] = 0
            document = segment
            for head in range(HV):
                key, query = (x[row, t, head // (HV // H)] for x in (k, q))
                decay = np.exp(g[row, t, head] * np.ones(K))
                new = decay[:, None] * state[row, head] + np.outer(key, v[row, t, head])
                state[row, head] = new
                o[row, t, head] = new.T @ query * K**-0.5
    return o, state


def rule(q, k, v, g, state=None, segments=None, *, backend="xla", chunk_size=CHUNK):
    return linear_attention(
        *(q, k, v, g),
        initial_state=state,
        segment_ids=segments,
        backend=backend,
        chunk_size=chunk_size,
    )


forward = compiled(rule, static_argnames=("backend", "chunk_size"))


@functools.partial(compiled, static_argnames=("backend",))
def forward_backward(q, k, v, g, state, segments=ONE_DOCUMENT, *, backend="xla"):
    """((o, final state), gradients by name) for fixed cotangents of both outputs."""
    inputs = dict(q=q, k=k, v=v, g=g, state=state)
    outputs, pull = jax.vjp(lambda x: rule(**x, segments=segments, backend=backend), inputs)
    waves = [np.cos(1.7 * np.arange(x.size) ** 1.1).astype(x.dtype) for x in outputs]
    return outputs, pull(tuple(w.reshape(x.shape) for w, x in zip(waves, outputs)))[0]


def in_float64(inputs):
    """`forward_backward` of the recurrence for the same numbers."""
    with jax.enable_x64(True):
        wide = [None if x is None else np.float64(x) for x in inputs]
        return jax.tree.map(np.asarray, forward_backward(*wide, backend="reference"))


def assert_trees_close(actual, expected, bound):
    actual, expected = (jax.tree_util.tree_leaves_with_path(x) for x in (actual, expected))
    assert [path for path, _ in actual] == [path for path, _ in expected]
    for (path, a), (_, b) in zip(actual, expected):
        assert relative_rms(a, b) <= bound, jax.tree_util.keystr(path)


# Values that others computed.


@pytest.mark.smoke
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["gla", "simple_gla", "retention"])
def test_golden_outputs(name, backend):
    for number in (0, 1):
        data = np.load(DATA / f"{name}_{number}.npz")
        g = data.get("g")
        if name == "retention":
            g = np.log1p(-(2.0 ** -(5.0 + np.arange(data["v"].shape[2])))).astype(np.float32)
        o, final = jax.jit(functools.partial(linear_attention, backend=backend))(
            *(data["q"], data["k"], data["v"], g),
            scale=float(data["scale"]),
            initial_state=data.get("initial_state"),
        )
        assert o.dtype == final.dtype == jnp.float32
        assert relative_rms(o, data["o"]) <= 1e-5
        if "final_state" in data:
            assert relative_rms(final, data["final_state"]) <= 1e-5


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("gate", "o_last", "o_sum", "state"),
    [
        ("none", (2.032213, -0.201960), 2.320960, (-2.128738, 0.148924, 2.935477, -0.503441)),
        ("head", (2.485320, 0.514760), 4.113549, (-2.843730, -0.821650, 2.777427, -0.211234)),
        ("channel", (2.494482, 0.486448), 4.022752, (-2.843730, -0.821650, 2.823107, -0.352384)),
    ],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_five_tokens_computed_by_hand(backend, gate, o_last, o_sum, state):
    t = np.arange(5.0)
    pairs = [(np.sin(t + 1), np.cos(t + 1)), (np.cos(2 * t + 1), np.sin(2 * t + 1))]
    q, k, v = (np.stack(x, -1)[None, :, None] for x in [*pairs, (t + 1, (-1) ** t)])
    g_channel = np.stack([-0.1 * (t + 1), -0.05 * (t + 2)], -1)[None, :, None]
    g = {"none": None, "head": g_channel[..., 0], "channel": g_channel}[gate]
    attend = jax.jit(functools.partial(linear_attention, backend=backend))
    o, final = jax.tree.map(np.asarray, attend(q, k, v, g))
    np.testing.assert_allclose(o[0, -1, 0], o_last, atol=2e-6)
    np.testing.assert_allclose(np.sum(o), o_sum, atol=5e-6)
    np.testing.assert_allclose(np.ravel(final), state, atol=2e-6)


# The chunked form and its gradient.


@pytest.mark.parametrize("gate", GATES)
def test_values_equal_loops_and_gradients_equal_the_recurrence(float64, gate):
    inputs = make_inputs(gate)
    expected, gradients = forward_backward(*inputs, SEGMENTS, backend="reference")
    assert_trees_close(tuple(expected), by_loops(*inputs, SEGMENTS), 1e-12)
    assert_trees_close(forward_backward(*inputs, SEGMENTS), (expected, gradients), 1e-12)


SLOW = [pytest.mark.slow, pytest.mark.ci]


@pytest.mark.parametrize(
    ("gate", "sizes"),  # 1 is in effect 16, 50 is 64; the other tests have chunks of 32
    [
        ("head", (1, 128)),
        ("channel", (50,)),
        pytest.param("none", (16, 64, 128), marks=SLOW),
        pytest.param("constant", (16, 64, 128), marks=SLOW),
        pytest.param("head", (64,), marks=SLOW),
        pytest.param("channel", (16, 128), marks=SLOW),
    ],
)
def test_without_documents_at_every_chunk_size(float64, gate, sizes):
    inputs = make_inputs(gate)
    expected = by_loops(*inputs, ONE_DOCUMENT)
    for chunk_size in sizes:
        assert_trees_close(forward(*inputs, chunk_size=chunk_size), expected, 1e-12)


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.parametrize("gate", ["head", "channel"])
def test_long_rows_go_from_stretch_to_stretch(float64, monkeypatch, gate):
    inputs = make_inputs(gate)
    expected = forward_backward(*inputs, SEGMENTS)
    monkeypatch.setattr(rows, "LONGEST_STRETCH", 1)  # three stretches of a chunk
    fresh = compiled(lambda *inputs: forward_backward.__wrapped__(*inputs, backend="xla"))
    assert_trees_close(fresh(*inputs, SEGMENTS), expected, 1e-12)


@pytest.mark.parametrize("gate", ["head", "channel"])
def test_splitting_a_row_changes_nothing(float64, gate):
    *inputs, state = make_inputs(gate)
    head, tail = (
        [None if x is None else x[:, part] for x in inputs]
        for part in (slice(None, T // 2), slice(T // 2, None))
    )
    o_head, middle = forward(*head, state)
    o_tail, final = forward(*tail, middle)
    parts = np.concatenate([o_head, o_tail], axis=1), final
    assert_trees_close(parts, by_loops(*inputs, state, ONE_DOCUMENT), 1e-12)


@pytest.mark.parametrize("gate", GATES)
def test_steps_equal_the_whole_row(gate):
    q, k, v, g, state = make_inputs(gate, np.float32)
    step = compiled(linear_attention_step)
    after, outputs = state, []
    for t in range(T):
        gate_t = g if g is None or g.ndim == 1 else g[:, t]
        o, after = step(after, q[:, t], k[:, t], v[:, t], gate_t)
        outputs.append(o)
    expected = by_loops(q, k, v, g, state, ONE_DOCUMENT)
    assert_trees_close((np.stack(outputs, 1), after), expected, 2e-6)


@pytest.mark.parametrize("gate", ["head", "channel"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_padding_content_is_ignored(float64, gate, backend):
    *inputs, state = make_inputs(gate)
    padding = SEGMENTS == 0
    spoilt = [np.where(padding.reshape(B, T, *(1,) * (x.ndim - 2)), -99.0, x) for x in inputs]
    expected = forward_backward(*inputs, state, SEGMENTS, backend=backend)
    assert_trees_close(forward_backward(*spoilt, state, SEGMENTS, backend=backend), expected, 0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_of_padding_keeps_its_state(float64, backend):
    inputs = make_inputs("head")
    results, _ = forward_backward(*inputs, SEGMENTS * [[0], [1]], backend=backend)
    o, final = jax.tree.map(np.asarray, results)
    assert np.all(o[0] == 0)
    np.testing.assert_array_equal(final[0], inputs[-1][0])
    assert relative_rms(final[1], inputs[-1][1]) > 0.1


# Numerical extremes, in float32.


@pytest.mark.parametrize("gate", ["head", "channel"])
def test_extreme_gates(gate):
    q, k, v, g, state = make_inputs(gate, np.float32)
    mixed = np.random.default_rng(1).choice([0.0, -0.01, -1.0, -20.0, -1e4], size=g.shape)
    for strong in (mixed, np.full(g.shape, -20.0), np.full(g.shape, -1e4), np.zeros(g.shape)):
        inputs = (q, k, v, strong.astype(np.float32), state)
        actual = forward_backward(*inputs)
        assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(actual))
        expected = in_float64(inputs)
        if np.all(strong == -1e4):  # nothing survives one token: these gradients are 0
            for name in ("g", "state"):
                assert np.all(actual[1].pop(name) == 0) and np.all(expected[1].pop(name) == 0)
        assert_trees_close(actual, expected, 3e-6)


def test_tokens_that_write_nothing():
    """k = 0, no decay: the state stays as it is, bit for bit."""
    q, k, v, g, state = make_inputs("channel", np.float32)
    (_, final), _ = forward_backward(q, np.zeros_like(k), v, np.zeros_like(g), state)
    np.testing.assert_array_equal(final, state)


def test_bfloat16_inputs():
    q, k, v, g, state = make_inputs("head", np.float32)
    rounded = [x.astype(jnp.bfloat16) for x in (q, k, v)]
    o, final = forward(*rounded, g, state)
    assert o.dtype == jnp.bfloat16 and final.dtype == jnp.float32
    wide = (np.float64(x) for x in rounded)
    o_wide, final_wide = by_loops(*wide, g, np.float64(state), ONE_DOCUMENT)
    assert relative_rms(final, final_wide) <= 1e-6  # computed in float32
    assert relative_rms(o, o_wide) <= 3e-3  # o itself is rounded to 8 bits


# Relations between the members of the family, and causality.


def test_equal_channels_equal_one_gate_per_head(float64):
    q, k, v, g, state = make_inputs("head")
    wide = np.broadcast_to(g[..., None], (*g.shape, K))
    by_head = forward_backward(q, k, v, g, state, SEGMENTS)
    by_channel = forward_backward(q, k, v, wide, state, SEGMENTS)
    by_channel[1]["g"] = np.sum(by_channel[1]["g"], axis=-1)
    assert_trees_close(by_channel, by_head, 1e-12)


@pytest.mark.parametrize("gate", ["head", "channel"])
def test_outputs_do_not_see_the_future(float64, gate):
    *inputs, state = make_inputs(gate)
    o = np.asarray(forward_backward(*inputs, state)[0][0])
    for t in (31, 40, 64):
        later = [np.array(x) for x in inputs]
        for x in later:
            x[:, t] *= 0.5
        o_later = np.asarray(forward_backward(*later, state)[0][0])
        np.testing.assert_array_equal(o_later[:, :t], o[:, :t])
        assert np.all(np.any(o_later[:, t] != o[:, t], axis=-1))


# Transformations.


@pytest.mark.parametrize("gate", ["head", pytest.param("channel", marks=pytest.mark.slow)])
def test_vmap_scan_and_checkpoint(gate):
    *inputs, _ = make_inputs(gate, np.float32, length=17)

    def loss(inputs, backend):
        """Two layers by scan, each recomputed in the backward pass, over two stacked batches."""

        def layer(v, _):
            q, k, _, g = inputs
            return linear_attention(q, k, v, g, backend=backend)[0], None

        v, _ = jax.lax.scan(jax.checkpoint(layer), inputs[2], length=2)
        return jnp.sum(jnp.sin(v))

    stacked = [np.stack([x, x[::-1]]) for x in inputs]
    results = [
        compiled(jax.vmap(jax.grad(functools.partial(loss, backend=backend))))(stacked)
        for backend in BACKENDS
    ]
    assert_trees_close(results[1], results[0], 1e-5)


@pytest.mark.parametrize("gate", ["head", pytest.param("channel", marks=pytest.mark.slow)])
def test_inside_shard_map(gate):
    """Manual over a mesh axis with checks on; k replicated, no initial state."""
    inputs = make_inputs(gate, np.float32, length=17)[:4]
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    split, copy = jax.sharding.PartitionSpec("data"), jax.sharding.PartitionSpec()

    def gradients(sharded, backend):
        def run(*inputs):
            return linear_attention(*inputs, backend=backend)

        if sharded:
            specs = (split, copy, split, split)
            run = jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=split)

        def loss(*inputs):
            return sum(jnp.sum(jnp.sin(x)) for x in run(*inputs))

        return compiled(jax.grad(loss, argnums=range(4)))(*inputs)

    expected = gradients(False, "reference")
    for backend in BACKENDS:
        assert_trees_close(gradients(True, backend), expected, 1e-5)


# Arguments.


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(v=jnp.zeros((1, 3, 3, 4))), "v has 3 heads.*multiple of the 2 heads"),
        (dict(k=jnp.zeros((1, 3, 2, 5))), r"k has shape \(1, 3, 2, 5\).*\(1, 3, 2, 4\)"),
        (dict(g=jnp.zeros((1, 3, 4, 5))), r"g has shape.*\(1, 3, 4, 4\)"),
        (dict(g=jnp.zeros(2)), r"g has shape \(2,\).*\(4,\)"),
        (dict(initial_state=jnp.zeros((1, 4, 4, 5))), r"initial_state has shape.*\(1, 4, 4, 4\)"),
        (dict(segment_ids=jnp.ones((1, 3))), "segment_ids has dtype float32; give integers"),
        (dict(q=jnp.zeros((1, 3, 2, 4), int)), "q has dtype int32"),
        (dict(chunk_size=0), "chunk_size is 0"),
        (dict(backend="cuda"), "backend 'cuda' does not exist"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    heads = dict(q=jnp.zeros((1, 3, 2, 4)), k=jnp.zeros((1, 3, 2, 4)))
    with pytest.raises(ValueError, match=f"linear_attention: {message}"):
        linear_attention(**{**heads, "v": jnp.zeros((1, 3, 4, 4)), "g": None, **change})
