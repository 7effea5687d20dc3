"""Linear attention's TPU kernels, run by the interpreter and judged by the recurrence in float64.

Memory that nothing has written reads as NaN there. The delta rule's test shares most of the kernels'
parts; here is what is different.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effarch.kernels import dispatch, linear_attention
from effarch.kernels.linear_attention import pallas_tpu

B, T, H, HV, K, V, CHUNK = 2, 77, 1, 2, 24, 40, 32
NAMES = ("q", "k", "v", "g", "initial_state")
CHANNELS = pytest.param("channel", marks=pytest.mark.slow)
SEGMENTS = np.array([[0] * 2 + [7] * 9 + [4] * 21 + [2] * 20 + [1] + [9] * 4 + [0] * 20, [5] * 77])


def relative_rms(actual, expected) -> float:
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    return np.sqrt(np.mean((actual - expected) ** 2)) / np.sqrt(np.mean(expected**2))


def make_inputs(kind, gate):
    rng = np.random.default_rng(0)
    q, k = rng.standard_normal((2, B, T, H, K)) / K**0.5
    v, state = rng.standard_normal((B, T, HV, V)), rng.standard_normal((B, HV, K, V))
    g = {
        "random": -np.exp(rng.standard_normal((B, T, HV, K)) - 1.5),
        "strong decay": np.full((B, T, HV, K), -20.0),
        "mixed decay": rng.choice([0.0, -0.01, -1.0, -20.0, -1e4], size=(B, T, HV, K)),
    }[kind]
    g = g if gate == "channel" else g[..., 0]
    return tuple(x.astype(np.float32) for x in (q, k, v, g, state))


def forward_backward(rule, *inputs):
    """o, the final state and the gradients of all inputs, by name, for fixed cotangents."""
    outputs, pull = jax.vjp(rule, *inputs)
    waves = (jnp.cos(1.7 * jnp.arange(x.size, dtype=jnp.float32) ** 1.1) for x in outputs)
    gradients = pull(tuple(y.reshape(x.shape).astype(x.dtype) for x, y in zip(outputs, waves)))
    return dict(zip(("o", "final_state", *NAMES), (*outputs, *gradients)))


def on_tpu(q, k, v, g, state):
    options = dict(initial_state=state, segment_ids=SEGMENTS, chunk_size=CHUNK, interpret=True)
    return pallas_tpu.linear_attention(q, k, v, g, scale=K**-0.5, **options)


def recurrence(q, k, v, g, state):
    options = dict(initial_state=state, segment_ids=SEGMENTS, backend="reference")
    return linear_attention(q, k, v, g, **options)


packed = jax.jit(functools.partial(forward_backward, on_tpu))
_judge = jax.jit(functools.partial(forward_backward, recurrence))


def judge(inputs):
    with jax.enable_x64(True):
        return jax.tree.map(np.asarray, _judge(*(np.float64(x) for x in inputs)))


def assert_close(actual, expected, bound):
    for name in expected:
        error = relative_rms(actual[name], expected[name])
        assert error <= bound, f"{name}: {error:.1e} > {bound}"


@pytest.mark.parametrize("kind", ["random", "strong decay", "mixed decay"])
@pytest.mark.parametrize("gate", ["head", CHANNELS])
def test_float32_equals_the_recurrence(kind, gate):
    """Documents, padding, an entering state, two value heads a key head, a last chunk half full."""
    inputs = make_inputs(kind, gate)
    first = packed(*inputs)
    assert_close(first, judge(inputs), 1e-5)
    jax.tree.map(np.testing.assert_array_equal, packed(*inputs), first)


@pytest.mark.slow
def test_without_decay_or_documents_or_a_state():
    inputs = make_inputs("random", "head")[:3]
    tpu = functools.partial(pallas_tpu.linear_attention, scale=K**-0.5, initial_state=None)
    tpu = functools.partial(tpu, segment_ids=None, chunk_size=CHUNK, interpret=True)
    plain = functools.partial(linear_attention, backend="reference")
    actual, expected = (
        jax.jit(functools.partial(forward_backward, rule))(*inputs) for rule in (tpu, plain)
    )
    assert_close(actual, expected, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("gate", ["head", "channel"])
def test_bfloat16(gate):
    *inputs, g, state = make_inputs("random", gate)
    inputs = [x.astype(jnp.bfloat16) for x in inputs]
    actual = packed(*inputs, g, state)
    assert actual["o"].dtype == jnp.bfloat16 and actual["final_state"].dtype == jnp.float32
    assert_close(actual, judge([*(x.astype(np.float32) for x in inputs), g, state]), 6e-3)


def test_another_platform_is_refused():
    with pytest.raises(dispatch.Unsupported, match=r"'pallas_tpu'.*runs on TPUs.* for cpu"):
        linear_attention(*make_inputs("random", "head")[:4], backend="pallas_tpu")
