"""The delta rule's GPU kernels, run by the interpreter and judged by the recurrence in float64.

Where the interpreter finds memory that nothing has written, it reads NaN, so a kernel that forgets an
output or reads one too early fails every comparison here.
"""

import jax
import numpy as np
import pytest

from effarch.kernels import dispatch
from effarch.kernels.delta_rule import pallas_gpu

NOTHING_ELSE = dict(initial_state=None, segment_ids=None, chunk_size=None)

# Padding in front, between and behind, documents of one token (also with an id that came before), a
# boundary on the edge of chunks (64), a document over two chunks.
SEGMENTS = np.array(
    [
        [0] * 2 + [7] * 5 + [3] + [7] + [0] * 3 + [4] * 20 + [2] * 20 + [1] + [9] * 20 + [0] * 4,
        [5] * 64 + [6] * 13,
    ],
    np.int32,
)


@pytest.fixture(scope="module")
def trial(delta_rule_trial):
    return delta_rule_trial(pallas_gpu, SEGMENTS)


def test_float32_equals_the_recurrence(trial, kind, gate):
    trial.check_float32(kind, gate)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "bound"),
    # What the rounding of factors that carry a decay or beta costs: their errors do not cancel in
    # sums over keys that are alike.
    [("random", 8e-3), ("similar keys", 2e-2), ("identical keys", 4e-2), ("strong decay", 8e-3)],
)
def test_bfloat16_is_as_good_as_its_factors(trial, kind, bound, gate):
    trial.check_bfloat16(trial.inputs(kind, gate), bound, kept=3)


def test_two_runs_are_bit_equal_and_padding_is_ignored(trial, gate):
    trial.check_repeats_and_padding(gate)


def test_another_platform_is_refused(trial):
    inputs = trial.inputs("random")
    with pytest.raises(dispatch.Unsupported, match=r"runs on GPUs.* for cpu"):
        pallas_gpu.gated_delta_rule(*inputs[:5], scale=1.0, **NOTHING_ELSE)


def test_what_the_kernels_do_not_treat_is_refused(trial):
    q, k, v, beta, g, _ = trial.inputs("random")
    wide = np.zeros((*q.shape[:3], 200), np.float32)
    with pytest.raises(dispatch.Unsupported, match="heads of 200 keys are wider than 128"):
        trial.kernel(wide, wide, v, beta, g)
    with jax.enable_x64(True), pytest.raises(dispatch.Unsupported, match="float64"):
        trial.kernel(*(np.float64(x) for x in (q, k, v, beta, g)))


@pytest.mark.slow
@pytest.mark.parametrize("gate", ["none", "head", "channel"])
@pytest.mark.parametrize(
    ("sizes", "chunk"),
    [((1, 50, 2, 2, 16, 16), 16), ((2, 40, 2, 4, 20, 70), 32), ((1, 130, 1, 1, 128, 128), None)],
)
def test_other_sizes_without_documents(trial, sizes, chunk, gate):
    trial.check_sizes(sizes, chunk, gate)


@pytest.mark.parametrize("gate", ["head", pytest.param("channel", marks=pytest.mark.slow)])
def test_values_wider_than_the_kernels_become_heads(trial, gate):
    inputs = trial.inputs("random", gate, (2, 77, 1, 2, 16, 149))
    trial.assert_close(trial.packed(*inputs), trial.judge(inputs), 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["delta_rule_0", "gated_delta_rule_1", "kda_1"])
def test_golden_outputs(trial, name):
    trial.check_golden(name)


@pytest.mark.slow
def test_scan_checkpoint_and_splitting(trial):
    trial.check_scan_checkpoint_and_splitting("head")
