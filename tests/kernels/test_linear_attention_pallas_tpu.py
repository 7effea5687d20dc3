"""Linear attention's TPU kernels, run by the interpreter and judged by the recurrence in float64.

Memory that nothing has written reads as NaN there. The delta rule's test shares most of the kernels'
parts; here is what is different.
"""

import jax
import numpy as np
import pytest

from effarch.kernels import dispatch, linear_attention
from effarch.kernels.linear_attention import pallas_tpu

B, T, H, HV, K, V, CHUNK = 2, 77, 1, 2, 24, 40, 32
SEGMENTS = np.array([[0] * 2 + [7] * 9 + [4] * 21 + [2] * 20 + [1] + [9] * 4 + [0] * 20, [5] * 77])


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


def on_tpu(q, k, v, g=None, state=None, *, segments=None):
    options = dict(initial_state=state, segment_ids=segments, chunk_size=CHUNK, interpret=True)
    return pallas_tpu.linear_attention(q, k, v, g, scale=K**-0.5, **options)


def recurrence(q, k, v, g=None, state=None, *, segments=None):
    options = dict(initial_state=state, segment_ids=segments, backend="reference")
    return linear_attention(q, k, v, g, **options)


@pytest.fixture(scope="module")
def trial(kernel_trial):
    names = ("q", "k", "v", "g", "initial_state")
    return kernel_trial(names, on_tpu, recurrence, SEGMENTS)


@pytest.mark.parametrize("kind", ["random", "strong decay", "mixed decay"])
def test_float32_equals_the_recurrence(trial, kind, gate):
    """Documents, padding, an entering state, two value heads a key head, a last chunk half full."""
    inputs = make_inputs(kind, gate)
    first = trial.packed(*inputs)
    trial.assert_close(first, trial.judge(inputs), 1e-5)
    jax.tree.map(np.testing.assert_array_equal, trial.packed(*inputs), first)


@pytest.mark.slow
def test_without_decay_or_documents_or_a_state(trial):
    inputs = make_inputs("random", "head")[:3]
    actual, expected = (trial.compiled(rule)(*inputs) for rule in (on_tpu, recurrence))
    trial.assert_close(actual, expected, 1e-5)


@pytest.mark.slow
def test_bfloat16(trial, gate):
    trial.check_bfloat16(make_inputs("random", gate), 6e-3, kept=2)


def test_another_platform_is_refused():
    with pytest.raises(dispatch.Unsupported, match=r"'pallas_tpu'.*runs on TPUs.* for cpu"):
        linear_attention(*make_inputs("random", "head")[:4], backend="pallas_tpu")
