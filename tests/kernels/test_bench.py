"""The bench on a CPU: what it times and what it writes."""

import json

import jax
import numpy as np
import pytest

from effarch.kernels.bench import timing
from effarch.kernels.report import cases


def test_rows_say_what_was_timed_where():
    spec = cases.parse_spec("T=32,H=1,K=16,V=16,dtype=float32")
    chosen = [cases.Case("delta_rule", "here", name, spec=spec) for name in ("xla", "reference")]
    rows = timing.measure(chosen, rounds=3)
    assert [row["case"]["backend"] for row in rows] == ["xla", "reference"]
    for row in rows:
        assert 0 < row["low"] <= row["median"] <= row["high"]
        assert row["tokens_per_second"] == pytest.approx(32 / row["median"])
        assert row["device"] == jax.devices()[0].device_kind and row["jax"] == jax.__version__
        assert json.loads(json.dumps(row)) == row


def test_the_time_of_a_call_is_that_of_one():
    calls = []

    def call():
        calls.append(None)
        return np.zeros(1)

    seconds = timing._time(call, 5)
    assert len(calls) == 5 and seconds > 0
    assert timing._repeats(call) > 1  # nothing fills a round alone


@pytest.mark.parametrize(
    ("op", "backward", "index"),
    [
        ("delta_rule", False, None),
        ("gated_delta_rule", False, 4),
        ("kda", True, 6),
        ("ssd", True, 5),
    ],
)
def test_the_gate_is_found_among_the_arguments(op, backward, index):
    case = cases.Case(op, "here", "xla", backward, cases.Spec(T=64, H=2, K=16, V=16))
    assert cases.gate_index(case) == index
    _, shapes = cases.program(case, None)
    if index is not None:
        last = (16,) if op == "kda" else ()
        assert shapes[index].shape == (1, 64, 2, *last)
