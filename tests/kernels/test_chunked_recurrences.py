"""What the chunked forms of the delta rule and of linear attention must both do.

Their values and gradients against the recurrence stand in test_delta_rule.py and
test_linear_attention.py.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effarch.kernels.chunked import rows

BACKENDS = ["reference", "xla"]
NAMES = ["delta_rule", "linear_attention"]
CI = [pytest.mark.slow, pytest.mark.ci]
PAIRS = [
    ("delta_rule", "head"),
    ("linear_attention", "channel"),
    pytest.param("delta_rule", "channel", marks=CI),
    pytest.param("linear_attention", "head", marks=pytest.mark.slow),
]
every_pair = pytest.mark.parametrize(("chunked", "gate"), PAIRS, indirect=["chunked"])
in_ci = pytest.mark.parametrize(
    "chunked", [pytest.param(x, marks=CI) for x in NAMES], indirect=True
)


@pytest.mark.parametrize("gate", [pytest.param(gate, marks=CI) for gate in ("head", "channel")])
def test_long_rows_go_from_stretch_to_stretch(chunked, float64, monkeypatch, gate):
    inputs = chunked.inputs(gate)
    expected = chunked.forward_backward(*inputs, segments=chunked.SEGMENTS)
    monkeypatch.setattr(rows, "LONGEST_STRETCH", 1)  # three stretches of a chunk
    fresh = chunked.compiled(
        lambda *inputs, segments: chunked.with_gradients(*inputs, segments=segments)
    )
    chunked.assert_close(fresh(*inputs, segments=chunked.SEGMENTS), expected, 1e-12)


@every_pair
def test_splitting_a_row_changes_nothing(chunked, float64, gate):
    *inputs, state = chunked.inputs(gate)
    cut = chunked.T // 2
    o_head, middle = chunked.forward(*(x[:, :cut] for x in inputs), state)
    o_tail, final = chunked.forward(*(x[:, cut:] for x in inputs), middle)
    parts = np.concatenate([o_head, o_tail], axis=1), final
    chunked.assert_close(parts, chunked.forward(*inputs, state), 1e-12)


# Padding.


@every_pair
@pytest.mark.parametrize("backend", BACKENDS)
def test_padding_content_is_ignored(chunked, float64, gate, backend):
    *inputs, state = chunked.inputs(gate)
    padding = chunked.SEGMENTS == 0
    mask = [padding.reshape(*padding.shape, *(1,) * (x.ndim - 2)) for x in inputs]
    spoilt = [np.where(where, -99.0, x) for where, x in zip(mask, inputs)]
    options = dict(segments=chunked.SEGMENTS, backend=backend)
    expected = chunked.forward_backward(*inputs, state, **options)
    chunked.assert_close(chunked.forward_backward(*spoilt, state, **options), expected, 0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_of_padding_keeps_its_state(chunked, relative_rms, float64, backend):
    inputs, segments = chunked.inputs("head"), chunked.SEGMENTS * [[0], [1]]
    results, _ = chunked.forward_backward(*inputs, segments=segments, backend=backend)
    o, final = jax.tree.map(np.asarray, results)
    assert np.all(o[0] == 0)
    np.testing.assert_array_equal(final[0], inputs[-1][0])
    assert relative_rms(final[1], inputs[-1][1]) > 0.1


# Gates, and causality.


@every_pair
def test_extreme_gates(chunked, gate):
    """In float32."""
    *arrays, g, state = chunked.inputs(gate, np.float32)
    mixed = np.random.default_rng(1).choice([0.0, -0.01, -1.0, -20.0, -1e4], size=g.shape)
    for strong in (mixed, np.full(g.shape, -20.0), np.full(g.shape, -1e4), np.zeros(g.shape)):
        inputs = (*arrays, strong.astype(np.float32), state)
        actual = chunked.forward_backward(*inputs)
        assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(actual))
        expected = chunked.in_float64(inputs)
        if np.all(strong == -1e4):  # nothing survives one token: these gradients are 0
            for name in ("g", "state"):
                assert np.all(actual[1].pop(name) == 0) and np.all(expected[1].pop(name) == 0)
        chunked.assert_close(actual, expected, 3e-6)


def test_equal_channels_equal_one_gate_per_head(chunked, float64):
    *arrays, g, state = chunked.inputs("head")
    wide = np.broadcast_to(g[..., None], (*g.shape, chunked.K))
    by_head, by_channel = (
        chunked.forward_backward(*arrays, gate, state, segments=chunked.SEGMENTS)
        for gate in (g, wide)
    )
    by_channel[1]["g"] = np.sum(by_channel[1]["g"], axis=-1)
    chunked.assert_close(by_channel, by_head, 1e-12)


@every_pair
def test_outputs_do_not_see_the_future(chunked, float64, gate):
    *inputs, state = chunked.inputs(gate)
    o = np.asarray(chunked.forward(*inputs, state)[0])
    for t in (31, 40, 64):
        later = [np.array(x) for x in inputs]
        for x in later:
            x[:, t] *= 0.5
        o_later = np.asarray(chunked.forward(*later, state)[0])
        np.testing.assert_array_equal(o_later[:, :t], o[:, :t])
        assert np.all(np.any(o_later[:, t] != o[:, t], axis=-1))


# Transformations.


@in_ci
def test_vmap_scan_and_checkpoint(chunked, gate):
    *inputs, _ = chunked.inputs(gate, np.float32, length=17)

    def loss(inputs, backend):
        """Two layers by scan, each recomputed in the backward pass, over two stacked batches."""
        q, k, v, *rest = inputs

        def layer(v, _):
            return chunked.function(q, k, v, *rest, backend=backend)[0], None

        return jnp.sum(jnp.sin(jax.lax.scan(jax.checkpoint(layer), v, length=2)[0]))

    stacked = [np.stack([x, x[::-1]]) for x in inputs]
    results = [
        chunked.compiled(jax.vmap(jax.grad(functools.partial(loss, backend=backend))))(stacked)
        for backend in BACKENDS
    ]
    chunked.assert_close(results[1], results[0], 1e-5)


@in_ci
def test_inside_shard_map(chunked, gate):
    """Manual over a mesh axis with checks on; k and beta replicated, no initial state."""
    inputs = chunked.inputs(gate, np.float32, length=17)[:-1]
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    split, copy = jax.sharding.PartitionSpec("data"), jax.sharding.PartitionSpec()
    specs = tuple(copy if name in ("k", "beta") else split for name in chunked.names)

    def gradients(sharded, backend):
        run = functools.partial(chunked.function, backend=backend)
        if sharded:
            run = jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=split)

        def loss(*inputs):
            return sum(jnp.sum(jnp.sin(x)) for x in run(*inputs))

        return chunked.compiled(jax.grad(loss, argnums=range(len(inputs))))(*inputs)

    expected = gradients(False, "reference")
    for backend in BACKENDS:
        chunked.assert_close(gradients(True, backend), expected, 1e-5)
