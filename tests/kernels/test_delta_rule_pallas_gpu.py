"""The delta rule's GPU kernels, run by the interpreter and judged by the recurrence in float64.

Where the interpreter finds memory that nothing has written, it reads NaN, so a kernel that forgets an
output or reads one too early fails every comparison here.
"""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effarch.kernels import dispatch, gated_delta_rule
from effarch.kernels.delta_rule import pallas_gpu

DATA = Path(__file__).parents[1] / "data"
B, T, H, HV, K, V = 2, 77, 1, 2, 24, 40
NOTHING_ELSE = dict(initial_state=None, segment_ids=None, chunk_size=None)
NAMES = ("q", "k", "v", "beta", "g", "initial_state")
CHANNELS = pytest.param("channel", marks=pytest.mark.slow)

# Padding in front, between and behind, documents of one token (also with an id that came before), a
# boundary on the edge of chunks (64), a document over two chunks.
SEGMENTS = np.array(
    [
        [0] * 2 + [7] * 5 + [3] + [7] + [0] * 3 + [4] * 20 + [2] * 20 + [1] + [9] * 20 + [0] * 4,
        [5] * 64 + [6] * 13,
    ],
    np.int32,
)
KINDS = (
    "random",
    "identical keys",
    "similar keys",
    "similar keys, beta 1.9",
    "strong decay",
    "mixed decay",
)


def make_inputs(kind, gate="head", sizes=(B, T, H, HV, K, V)):
    """q, k, v, beta, g and an initial state, float32; some beta are 0."""
    batch, length, heads, value_heads, width, value_width = sizes
    rng = np.random.default_rng(0)
    q, k = rng.standard_normal((2, batch, length, heads, width))
    v = rng.standard_normal((batch, length, value_heads, value_width))
    beta = 2 / (1 + np.exp(-rng.standard_normal((batch, length, value_heads))))
    g = -np.exp(rng.standard_normal((batch, length, value_heads, width)) - 1.5)
    if kind == "identical keys":
        k, beta, g = np.broadcast_to(k[:, :1], k.shape), np.full_like(beta, 0.99), 0.01 * g
    if kind.startswith("similar keys"):  # their cosine is about 0.92
        strength = 1.9 if kind.endswith("1.9") else 0.95
        k, beta, g = k[:, :1] + 0.3 * k, np.full_like(beta, strength), 0.02 * g
    if kind == "strong decay":
        g = np.full_like(g, -20.0)
    if kind == "mixed decay":
        g = rng.choice([0.0, -0.01, -1.0, -20.0, -1e4], size=g.shape)
    beta[:, 5::9] = 0
    g = g if gate == "channel" else g[..., 0]
    q, k = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (q, k))
    state = rng.standard_normal((batch, value_heads, width, value_width))
    return tuple(x.astype(np.float32) for x in (q, k, v, beta, g, state))


def forward_backward(rule, *inputs):
    """o, the final state and the gradients of all inputs, by name, for fixed cotangents."""
    outputs, pull = jax.vjp(rule, *inputs)
    gradients = pull(tuple(wave(x.shape).astype(x.dtype) for x in outputs))
    return dict(zip(("o", "final_state", *NAMES), (*outputs, *gradients)))


def wave(shape):
    return jnp.cos(1.7 * jnp.arange(np.prod(shape), dtype=jnp.float32) ** 1.1).reshape(shape)


def on_gpu(q, k, v, beta, g=None, state=None, *, segments=None, chunk_size=None):
    options = dict(initial_state=state, segment_ids=segments, chunk_size=chunk_size)
    scale = q.shape[-1] ** -0.5
    return pallas_gpu.gated_delta_rule(q, k, v, beta, g, scale=scale, interpret=True, **options)


def recurrence(q, k, v, beta, g=None, state=None, *, segments=None):
    options = dict(initial_state=state, segment_ids=segments)
    return gated_delta_rule(q, k, v, beta, g, backend="reference", **options)


packed = jax.jit(functools.partial(forward_backward, functools.partial(on_gpu, segments=SEGMENTS)))
_judge = jax.jit(
    functools.partial(forward_backward, functools.partial(recurrence, segments=SEGMENTS))
)


def judge(inputs, run=_judge):
    with jax.enable_x64(True):
        return jax.tree.map(np.asarray, run(*(np.float64(x) for x in inputs)))


def assert_close(actual, expected, bound):
    for name in expected:
        x, y = (np.asarray(values[name], np.float64) for values in (actual, expected))
        error = np.sqrt(np.mean((x - y) ** 2)) / np.sqrt(np.mean(y**2))
        assert error <= bound, f"{name}: {error:.1e} > {bound}"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("gate", ["head", CHANNELS])
def test_float32_equals_the_recurrence(kind, gate):
    """Documents, padding, an entering state, two value heads a key head, a last chunk half full."""
    inputs = make_inputs(kind, gate)
    assert_close(packed(*inputs), judge(inputs), 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "bound"),
    # What the rounding of factors that carry a decay or beta costs: their errors do not cancel in
    # sums over keys that are alike.
    [("random", 8e-3), ("similar keys", 2e-2), ("identical keys", 4e-2), ("strong decay", 8e-3)],
)
@pytest.mark.parametrize("gate", ["head", "channel"])
def test_bfloat16_is_as_good_as_its_factors(kind, bound, gate):
    *inputs, beta, g, state = make_inputs(kind, gate)
    inputs = [x.astype(jnp.bfloat16) for x in inputs]
    actual = packed(*inputs, beta, g, state)
    assert actual["o"].dtype == jnp.bfloat16 and actual["final_state"].dtype == jnp.float32
    assert_close(actual, judge([*(x.astype(np.float32) for x in inputs), beta, g, state]), bound)


@pytest.mark.parametrize("gate", ["head", CHANNELS])
def test_two_runs_are_bit_equal_and_padding_is_ignored(gate):
    *inputs, state = make_inputs("random", gate)
    padding = SEGMENTS == 0
    spoilt = [np.where(padding.reshape(B, T, *(1,) * (x.ndim - 2)), -99, x) for x in inputs]
    first = packed(*inputs, state)
    for again in (packed(*inputs, state), packed(*(np.float32(x) for x in spoilt), state)):
        jax.tree.map(np.testing.assert_array_equal, again, first)
    assert all(np.all(np.asarray(first[name])[padding] == 0) for name in ("o", *NAMES[:-1]))


def test_another_platform_is_refused():
    inputs = make_inputs("random")
    with pytest.raises(dispatch.Unsupported, match=r"runs on GPUs.* for cpu"):
        pallas_gpu.gated_delta_rule(*inputs[:5], scale=1.0, **NOTHING_ELSE)


def test_what_the_kernels_do_not_treat_is_refused():
    q, k, v, beta, g, _ = make_inputs("random")
    wide = np.zeros((B, T, H, 200), np.float32)
    with pytest.raises(dispatch.Unsupported, match="heads of 200 and 40 are wider than 128"):
        on_gpu(wide, wide, v, beta, g)
    with jax.enable_x64(True), pytest.raises(dispatch.Unsupported, match="float64"):
        on_gpu(*(np.float64(x) for x in (q, k, v, beta, g)))


@pytest.mark.slow
@pytest.mark.parametrize("gate", ["none", "head", "channel"])
@pytest.mark.parametrize(
    ("sizes", "chunk"),
    [((1, 50, 2, 2, 16, 16), 16), ((2, 40, 2, 4, 20, 70), 32), ((1, 130, 1, 1, 128, 128), None)],
)
def test_other_sizes_without_documents(sizes, chunk, gate):
    *inputs, g, _ = make_inputs("random", gate, sizes)
    inputs += [] if gate == "none" else [g]
    run = jax.jit(functools.partial(forward_backward, functools.partial(on_gpu, chunk_size=chunk)))
    expected = judge(inputs, jax.jit(functools.partial(forward_backward, recurrence)))
    assert_close(run(*inputs), expected, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["delta_rule_0", "gated_delta_rule_1", "kda_1"])
def test_golden_outputs(name):
    data = np.load(DATA / f"{name}.npz")
    rule = functools.partial(pallas_gpu.gated_delta_rule, interpret=True, chunk_size=None)
    rule = functools.partial(rule, scale=float(data["scale"]), segment_ids=None)
    inputs = (data[x] for x in ("q", "k", "v", "beta"))
    o, final = jax.jit(rule)(*inputs, data.get("g"), initial_state=data.get("initial_state"))
    assert_close(dict(o=o, final=final), dict(o=data["o"], final=data["final_state"]), 1e-5)


@pytest.mark.slow
def test_scan_checkpoint_and_splitting():
    """Two layers by scan, recomputed in the backward pass; a row cut in two with the state carried."""
    *inputs, state = make_inputs("random")

    def loss(v, rule):
        q, k, _, beta, g = inputs

        def layer(v, _):
            return rule(q, k, v, beta, g)[0], None

        return jnp.sum(jnp.sin(jax.lax.scan(jax.checkpoint(layer), v, length=2)[0]))

    actual, expected = (
        jax.jit(jax.grad(functools.partial(loss, rule=rule)))(inputs[2])
        for rule in (on_gpu, recurrence)
    )
    assert_close(dict(v=actual), dict(v=expected), 1e-5)
    run = jax.jit(on_gpu)
    o, final = run(*inputs, state)
    o_head, middle = run(*(x[:, :50] for x in inputs), state)
    o_tail, tail = run(*(x[:, 50:] for x in inputs), middle)
    joined = dict(o=np.concatenate([o_head, o_tail], 1), final=tail)
    assert_close(joined, dict(o=o, final=final), 2e-6)
