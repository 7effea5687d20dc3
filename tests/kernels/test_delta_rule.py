"""The delta rule: the chunked form, its gradient and the public contract.

Most comparisons run in float64, where the chunked form and the recurrence agree to 1e-12 and every
wrong factor shows. Shapes repeat on purpose: each new one costs a compilation, for which machine code
is optimised less than usual (the graph is the same).
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effarch.kernels import gated_delta_rule, gated_delta_rule_step
from effarch.kernels.chunked import rows

BACKENDS = ["reference", "xla"]
GATES = ["none", "head", "channel"]
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


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


def relative_rms(actual, expected) -> float:
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    return np.sqrt(np.mean((actual - expected) ** 2)) / np.sqrt(np.mean(expected**2))


def make_inputs(gate, dtype=np.float64, length=T, seed=0):
    """q, k (of norm 1), v, beta in (0, 2), g, and an initial state."""
    rng = np.random.default_rng(seed)
    q, k = rng.standard_normal((2, B, length, H, K))
    q, k = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (q, k))
    v = rng.standard_normal((B, length, HV, V))
    beta = 2 / (1 + np.exp(-rng.standard_normal((B, length, HV))))
    g = {
        "none": None,
        "head": -np.exp(rng.standard_normal((B, length, HV)) - 1.5),
        "channel": -np.exp(rng.standard_normal((B, length, HV, K)) - 1.5),
    }[gate]
    state = rng.standard_normal((B, HV, K, V))
    arrays = (q, k, v, beta, g, state)
    return tuple(None if x is None else x.astype(dtype) for x in arrays)


def rule(q, k, v, beta, g, state=None, segments=None, *, backend="xla", chunk_size=CHUNK):
    return gated_delta_rule(
        *(q, k, v, beta, g),
        initial_state=state,
        segment_ids=segments,
        backend=backend,
        chunk_size=chunk_size,
    )


forward = compiled(rule, static_argnames=("backend", "chunk_size"))


def forward_backward(*inputs, backend="xla"):
    """((o, final state), gradients by name) for fixed cotangents of both outputs."""
    return _forward_backward(*inputs, backend=backend)


def _with_gradients(q, k, v, beta, g, state, segments=None, **options):
    inputs = dict(q=q, k=k, v=v, beta=beta, g=g, state=state)

    def run(inputs):
        return rule(**inputs, segments=segments, **options)

    outputs, pull = jax.vjp(run, inputs)
    return outputs, pull(cotangents(outputs))[0]


_forward_backward = compiled(_with_gradients, static_argnames=("backend",))


def in_float64(inputs):
    """`forward_backward` of the recurrence for the same numbers."""
    with jax.enable_x64(True):
        wide = [None if x is None else np.float64(x) for x in inputs]
        one_document = np.ones_like(SEGMENTS)
        return jax.tree.map(np.asarray, forward_backward(*wide, one_document, backend="reference"))


def cotangents(outputs):
    waves = [np.cos(1.7 * np.arange(x.size) ** 1.1).astype(x.dtype) for x in outputs]
    return tuple(wave.reshape(x.shape) for wave, x in zip(waves, outputs))


def assert_trees_close(actual, expected, bound):
    actual, expected = (jax.tree_util.tree_leaves_with_path(x) for x in (actual, expected))
    assert [path for path, _ in actual] == [path for path, _ in expected]
    for (path, a), (_, b) in zip(actual, expected):
        assert relative_rms(a, b) <= bound, jax.tree_util.keystr(path)


# The chunked form against the recurrence.


@pytest.mark.parametrize("gate", GATES)
def test_values_and_gradients_equal_the_recurrence(float64, gate):
    inputs = make_inputs(gate)
    expected = forward_backward(*inputs, SEGMENTS, backend="reference")
    assert_trees_close(forward_backward(*inputs, SEGMENTS), expected, 1e-12)


@pytest.mark.parametrize("gate", GATES)
def test_rows_of_one_document_equal_the_recurrence(gate):
    """float32, without segment ids, judged in float64."""
    inputs = make_inputs(gate, np.float32)
    assert_trees_close(forward_backward(*inputs), in_float64(inputs), 3e-6)


SLOW = [pytest.mark.slow, pytest.mark.ci]


@pytest.mark.parametrize(
    ("gate", "sizes"),  # 1 is in effect 16, 50 is 64; the other tests have chunks of 32
    [
        ("head", (1, 128)),
        ("channel", (50,)),
        pytest.param("none", (16, 64, 128), marks=SLOW),
        pytest.param("head", (64,), marks=SLOW),
        pytest.param("channel", (16, 128), marks=SLOW),
    ],
)
def test_every_chunk_size_gives_the_same(float64, gate, sizes):
    inputs = make_inputs(gate)
    expected, _ = in_float64(inputs)
    for chunk_size in sizes:
        assert_trees_close(forward(*inputs, chunk_size=chunk_size), expected, 1e-12)


@pytest.mark.slow
@pytest.mark.ci
def test_long_rows_go_from_stretch_to_stretch(float64, monkeypatch):
    inputs = make_inputs("head")
    expected = _forward_backward(*inputs, SEGMENTS, backend="xla")
    monkeypatch.setattr(rows, "LONGEST_STRETCH", 1)  # three stretches of a chunk
    fresh = compiled(lambda *inputs: _with_gradients(*inputs, backend="xla"))
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
    assert_trees_close(parts, forward(*inputs, state), 1e-12)


@pytest.mark.parametrize("gate", GATES)
def test_steps_equal_the_whole_row(gate):
    *inputs, state = make_inputs(gate, np.float32)
    step = compiled(gated_delta_rule_step)
    after, outputs = state, []
    for t in range(T):
        o, after = step(after, *(None if x is None else x[:, t] for x in inputs))
        outputs.append(o)
    whole, _ = forward_backward(*inputs, state)
    assert_trees_close((np.stack(outputs, 1), after), whole, 2e-6)


# Documents.


@pytest.mark.parametrize("gate", ["head", pytest.param("channel", marks=pytest.mark.slow)])
def test_packed_documents_equal_documents_alone(float64, gate):
    """Each document of row 0 alone, without segment ids, through the recurrence."""
    *inputs, state = make_inputs(gate)
    results = forward_backward(*inputs, state, SEGMENTS)
    (o, final), gradients = jax.tree.map(np.asarray, results)
    d_o, d_final = cotangents((o, final))
    row, is_real = SEGMENTS[0], SEGMENTS[0] != 0
    borders = [0, *(np.flatnonzero(row[1:] != row[:-1]) + 1), T]
    spans = [(a, b) for a, b in itertools.pairwise(borders) if row[a] != 0]
    assert [b - a for a, b in spans] == [5, 1, 1, 20, 20, 1, 5]

    @compiled
    def alone(inputs, state, d_o, d_final):
        outputs, pull = jax.vjp(lambda x, s: rule(*x, s, backend="reference"), inputs, state)
        return outputs, pull((d_o, d_final))

    for a, b in spans:
        is_first, is_last = (a, b) == spans[0], (a, b) == spans[-1]
        own = tuple(x[:1, a:b] for x in inputs)
        own_state = state[:1] * is_first
        (o_alone, final_alone), (d_inputs, d_state) = alone(
            own, own_state, d_o[:1, a:b], d_final[:1] * is_last
        )
        assert_trees_close(o[:1, a:b], o_alone, 1e-12)
        for name, gradient in zip(("q", "k", "v", "beta", "g"), d_inputs):
            np.testing.assert_allclose(gradients[name][:1, a:b], gradient, atol=1e-12)
        if is_first:
            assert_trees_close(gradients["state"][:1], d_state, 1e-12)
        if is_last:
            assert_trees_close(final[:1], final_alone, 1e-12)
    assert np.all(o[0, ~is_real] == 0)
    assert all(np.all(gradients[name][0, ~is_real] == 0) for name in ("q", "k", "v", "beta", "g"))


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
    q, k, v, beta, g, state = make_inputs(gate, np.float32)
    mixed = np.random.default_rng(1).choice([0.0, -0.01, -1.0, -20.0, -1e4], size=g.shape)
    for strong in (mixed, np.full(g.shape, -20.0), np.full(g.shape, -1e4), np.zeros(g.shape)):
        inputs = (q, k, v, beta, strong.astype(np.float32), state)
        actual = forward_backward(*inputs)
        assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(actual))
        expected = in_float64(inputs)
        if np.all(strong == -1e4):  # nothing survives one token: these gradients are 0
            for name in ("g", "state"):
                assert np.all(actual[1].pop(name) == 0) and np.all(expected[1].pop(name) == 0)
        assert_trees_close(actual, expected, 3e-6)


@pytest.mark.parametrize("beta", [1.0, 2.0])
@pytest.mark.parametrize("gate", GATES)
def test_repeated_keys_are_accurate(gate, beta):
    """Power series lose every digit here; the recurrence in float64 is the judge."""
    q, k, v, old_beta, g, state = make_inputs(gate, np.float32)
    k = np.broadcast_to(k[:, :1], k.shape)
    g = None if g is None else np.zeros_like(g)
    inputs = (q, k, v, np.full_like(old_beta, beta), g, state)
    assert_trees_close(forward_backward(*inputs), in_float64(inputs), 1e-5)


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.parametrize("gate", ["none", "channel"])
def test_repeated_keys_through_four_whole_chunks(gate):
    """Chunks of 64, whose inverse takes two merges."""
    q, k, v, old_beta, g, state = make_inputs(gate, np.float32, length=256)
    k = np.broadcast_to(k[:, :1], k.shape)
    g = None if g is None else np.zeros_like(g)
    run = compiled(lambda *inputs: _with_gradients(*inputs, backend="xla", chunk_size=64))
    judge = compiled(lambda *inputs: _with_gradients(*inputs, backend="reference"))
    # With beta = 2 every token turns the state over: 256 roundings of 1.2e-7 add up, none fades.
    for beta, bound in ((1.0, 1e-5), (2.0, 5e-5)):
        inputs = (q, k, v, np.full_like(old_beta, beta), g, state)
        with jax.enable_x64(True):
            wide = [None if x is None else np.float64(x) for x in inputs]
            expected = jax.tree.map(np.asarray, judge(*wide))
        outputs, gradients = run(*inputs)
        assert_trees_close(outputs, expected[0], bound)
        assert_trees_close(gradients, expected[1], 1e-4)


@pytest.mark.parametrize("gate", GATES)
def test_tokens_that_write_nothing(gate):
    """beta = 0 or k = 0, no decay: the state stays as it is, bit for bit."""
    q, k, v, beta, g, state = make_inputs(gate, np.float32)
    g = None if g is None else np.zeros_like(g)
    (_, final), _ = forward_backward(q, k, v, np.zeros_like(beta), g, state)
    np.testing.assert_array_equal(final, state)
    (_, final), _ = forward_backward(q, np.zeros_like(k), v, beta, g, state)
    np.testing.assert_array_equal(final, state)


def test_bfloat16_inputs():
    inputs = make_inputs("head", np.float32)
    rounded = [x.astype(jnp.bfloat16) for x in inputs[:4]]
    o, final = forward(*rounded, *inputs[4:])
    assert o.dtype == jnp.bfloat16 and final.dtype == jnp.float32
    wide = (x.astype(np.float32) for x in rounded)
    (o_wide, final_wide), _ = forward_backward(*wide, *inputs[4:])
    assert relative_rms(final, final_wide) <= 1e-6  # computed in float32
    assert relative_rms(o, o_wide) <= 3e-3  # o itself is rounded to 8 bits


# Relations between the members of the family, and causality.


def test_equal_channels_equal_one_gate_per_head(float64):
    q, k, v, beta, g, state = make_inputs("head")
    wide = np.broadcast_to(g[..., None], (*g.shape, K))
    by_head = forward_backward(q, k, v, beta, g, state, SEGMENTS)
    by_channel = forward_backward(q, k, v, beta, wide, state, SEGMENTS)
    by_channel[1]["g"] = np.sum(by_channel[1]["g"], axis=-1)
    assert_trees_close(by_channel, by_head, 1e-12)


def test_zero_gates_equal_no_gates(float64):
    q, k, v, beta, g, state = make_inputs("head")
    zero = forward_backward(q, k, v, beta, np.zeros_like(g), state, SEGMENTS)
    zero[1]["g"] = None
    assert_trees_close(forward_backward(q, k, v, beta, None, state, SEGMENTS), zero, 1e-12)


@pytest.mark.parametrize("gate", ["head", "channel"])
def test_outputs_do_not_see_the_future(float64, gate):
    *inputs, state = make_inputs(gate)
    o = np.asarray(forward(*inputs, state)[0])
    for t in (31, 40, 64):
        later = [np.array(x) for x in inputs]
        for x in later:
            x[:, t] *= 0.5
        o_later = np.asarray(forward(*later, state)[0])
        np.testing.assert_array_equal(o_later[:, :t], o[:, :t])
        assert np.all(np.any(o_later[:, t] != o[:, t], axis=-1))


# Transformations.


@pytest.mark.slow
@pytest.mark.parametrize("gate", ["head", "channel"])
def test_vmap_scan_and_checkpoint(gate):
    *inputs, _ = make_inputs(gate, np.float32, length=17)

    def loss(inputs, backend):
        """Two layers by scan, each recomputed in the backward pass, over two stacked batches."""

        def layer(v, _):
            q, k, _, beta, g = inputs
            return gated_delta_rule(q, k, v, beta, g, backend=backend)[0], None

        v, _ = jax.lax.scan(jax.checkpoint(layer), inputs[2], length=2)
        return jnp.sum(jnp.sin(v))

    stacked = [np.stack([x, x[::-1]]) for x in inputs]
    results = [
        compiled(jax.vmap(jax.grad(functools.partial(loss, backend=backend))))(stacked)
        for backend in BACKENDS
    ]
    assert_trees_close(results[1], results[0], 1e-5)


@pytest.mark.slow
@pytest.mark.ci
def test_inside_shard_map():
    """Manual over a mesh axis with checks on; k, beta replicated, no initial state."""
    inputs = make_inputs("head", np.float32, length=17)[:5]
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    split, copy = jax.sharding.PartitionSpec("data"), jax.sharding.PartitionSpec()
    specs = (split, copy, split, copy, split)

    def sharded(*inputs, backend):
        rule = functools.partial(gated_delta_rule, backend=backend)
        return jax.shard_map(rule, mesh=mesh, in_specs=specs, out_specs=split)(*inputs)

    def plain(*inputs, backend):
        return gated_delta_rule(*inputs, backend=backend)

    def gradients(run, backend):
        def loss(*inputs):
            return sum(jnp.sum(jnp.sin(x)) for x in run(*inputs, backend=backend))

        return compiled(jax.grad(loss, argnums=range(5)))(*inputs)

    expected = gradients(plain, "reference")
    for backend in BACKENDS:
        assert_trees_close(gradients(sharded, backend), expected, 1e-5)
