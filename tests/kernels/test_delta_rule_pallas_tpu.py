"""The delta rule's TPU kernels, run by the interpreter and judged by the recurrence in float64.

Where the interpreter finds memory that nothing has written, it reads NaN, so a kernel that forgets an
output or reads one too early fails every comparison here.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effarch.kernels import dispatch, gated_delta_rule
from effarch.kernels.delta_rule import pallas_tpu

# Padding in front, between and behind (also a chunk of nothing else), documents of one token (also
# with an id that came before), a boundary on the edge of chunks (32), a document over two chunks.
SEGMENTS = np.array(
    [
        [0] * 2 + [7] * 5 + [3] + [7] + [0] * 3 + [4] * 20 + [2] * 20 + [1] + [9] * 4 + [0] * 20,
        [5] * 64 + [6] * 13,
    ],
    np.int32,
)


@pytest.fixture(scope="module")
def trial(delta_rule_trial):
    return delta_rule_trial(pallas_tpu, SEGMENTS, chunk_size=32)


def test_float32_equals_the_recurrence(trial, kind, gate):
    trial.check_float32(kind, gate)


@pytest.mark.parametrize(
    ("kind", "bound"),
    # What the rounding of factors that carry a decay or beta costs: their errors do not cancel in
    # sums over keys that are alike.
    [("random", 8e-3), ("similar keys", 2e-2), ("identical keys", 4e-2), ("strong decay", 8e-3)],
)
def test_bfloat16_is_as_good_as_its_factors(trial, kind, bound, gate):
    trial.check_bfloat16(trial.inputs(kind, gate), bound, kept=3)


@pytest.mark.slow
@pytest.mark.parametrize("gate", ["head", "channel"])
def test_precise_factors_keep_what_alike_keys_lose(trial, relative_rms, gate):
    sizes = (1, 128, 1, 2, 128, 128)
    *inputs, beta, g, state = trial.inputs("similar keys, beta 1.9", gate, sizes)
    inputs = [x.astype(jnp.bfloat16) for x in inputs] + [beta, g, state]
    _, expected = trial.judge([np.float32(x) for x in inputs], jax.jit(trial.recurrence))
    errors = []
    for precise in (False, True):
        run = jax.jit(functools.partial(trial.kernel, chunk_size=64, precise=precise))
        errors.append(relative_rms(run(*inputs)[1], expected))
    # A fifth of the error here; what is left is the rounding of w and of the state.
    assert errors[1] <= 8e-3 and errors[1] <= 0.4 * errors[0], errors


def test_two_runs_are_bit_equal_and_padding_is_ignored(trial, gate):
    trial.check_repeats_and_padding(gate)


def test_another_platform_is_refused(trial):
    with pytest.raises(dispatch.Unsupported, match=r"'pallas_tpu'.*runs on TPUs.* for cpu"):
        gated_delta_rule(*trial.inputs("random")[:5], backend="pallas_tpu")


def test_what_the_kernels_do_not_treat_is_refused(trial):
    q, k, v, beta, g, _ = trial.inputs("random")
    wide = np.zeros((*q.shape[:3], 300), np.float32)
    with pytest.raises(dispatch.Unsupported, match="heads of 300 keys are wider than 256"):
        trial.kernel(wide, wide, v, beta, g)
    with jax.enable_x64(True), pytest.raises(dispatch.Unsupported, match="float64"):
        trial.kernel(*(np.float64(x) for x in (q, k, v, beta, g)))


@pytest.mark.slow
@pytest.mark.parametrize("gate", ["none", "head", "channel"])
@pytest.mark.parametrize(
    ("sizes", "chunk"),
    [
        ((1, 130, 2, 2, 16, 16), 64),  # a key head a value head
        ((1, 33, 8, 8, 128, 128), 32),  # two groups of heads
        ((2, 40, 2, 4, 130, 140), 32),  # keys and values that take 256 lanes
        ((1, 40, 1, 2, 24, 300), 32),  # values in two pieces
        ((1, 200, 1, 1, 128, 128), None),  # chunks of 128
    ],
)
def test_other_sizes_without_documents(trial, sizes, chunk, gate):
    trial.check_sizes(sizes, chunk, gate)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["delta_rule_0", "gated_delta_rule_1", "kda_1"])
def test_golden_outputs(trial, name):
    trial.check_golden(name)


@pytest.mark.slow
@pytest.mark.parametrize("gate", ["head", "channel"])
def test_scan_checkpoint_and_splitting(trial, gate):
    trial.check_scan_checkpoint_and_splitting(gate)
