"""Learning-rate schedules: values from the formulas, exact edges, sentences."""

import math

import jax
import numpy as np
import pytest

from effarch.training import schedules

PEAK, TOTAL, WARMUP = 3e-3, 1000, 40


def values(schedule, steps=range(TOTAL)):
    return np.asarray(jax.vmap(schedule)(np.asarray(steps, np.int32)), np.float64)


def shape(name, t):
    return {
        "linear": 1 - t,
        "1-sqrt": 1 - math.sqrt(t),
        "cosine": (1 + math.cos(math.pi * t)) / 2,
    }[name]


@pytest.mark.parametrize("final", [0.0, 0.1, 1.0])
def test_cosine_follows_its_formula(final):
    schedule = schedules.build("cosine", PEAK, TOTAL, warmup_steps=WARMUP, final_fraction=final)
    expected = [
        PEAK * (s + 1) / WARMUP
        if s < WARMUP
        else PEAK * (final + (1 - final) * shape("cosine", (s - WARMUP) / (TOTAL - WARMUP)))
        for s in range(TOTAL)
    ]
    np.testing.assert_allclose(values(schedule), expected, rtol=1e-5, atol=1e-6 * PEAK)


@pytest.mark.parametrize("name", ["linear", "1-sqrt", "cosine"])
@pytest.mark.parametrize("final", [0.0, 0.2])
def test_wsd_follows_its_formula(name, final):
    schedule = schedules.build(
        "wsd",
        PEAK,
        TOTAL,
        warmup_steps=WARMUP,
        decay_fraction=0.3,
        decay_shape=name,
        final_fraction=final,
    )
    expected = []
    for s in range(TOTAL):
        decayed = final + (1 - final) * shape(name, max(s - 700, 0) / 300)
        expected.append(PEAK * min((s + 1) / WARMUP, 1) * decayed)
    np.testing.assert_allclose(values(schedule), expected, rtol=1e-5, atol=1e-6 * PEAK)


@pytest.mark.parametrize("kind", schedules.KINDS)
def test_edges_are_exact_and_no_update_is_wasted(kind):
    schedule = schedules.build(kind, PEAK, TOTAL, warmup_steps=WARMUP)
    first, top, last, end, beyond = values(schedule, [0, WARMUP - 1, TOTAL - 1, TOTAL, 10 * TOTAL])
    final = schedules.options(kind).get("final_fraction", 1.0) * PEAK
    assert first == np.float32(PEAK) * np.float32(1 / WARMUP)
    assert top == np.float32(PEAK)
    assert last > 0
    assert last == pytest.approx(final, abs=0.01 * PEAK)
    assert end == beyond == pytest.approx(final, rel=1e-6, abs=1e-8 * PEAK)


@pytest.mark.parametrize("kind", schedules.KINDS)
def test_without_a_warmup_the_first_update_has_the_peak(kind):
    assert float(schedules.build(kind, PEAK, TOTAL)(0)) == np.float32(PEAK)


@pytest.mark.parametrize("name", ["linear", "1-sqrt", "cosine"])
def test_wsd_leaves_the_constant_trunk_where_it_says_and_bit_equal_until_there(name):
    trunk = schedules.build("constant", PEAK, TOTAL, warmup_steps=WARMUP)
    branch = schedules.build("wsd", PEAK, TOTAL // 2, warmup_steps=WARMUP, decay_shape=name)
    start = schedules.decay_start(TOTAL // 2, 0.2)
    assert start == 400
    same = values(trunk) == values(branch)
    assert same[: start + 1].all()
    assert not same[start + 1 :].any()


def test_a_schedule_takes_numbers_and_traced_steps_alike():
    schedule = schedules.build("wsd", PEAK, TOTAL, warmup_steps=WARMUP)
    for step in (0, 5, WARMUP, 900):
        traced = jax.jit(schedule)(np.int32(step))
        assert float(traced) == pytest.approx(float(schedule(step)), rel=1e-6)


def test_options_are_the_keyword_arguments_with_their_defaults():
    assert schedules.options("constant") == {"warmup_steps": 0}
    assert schedules.options("wsd") == {
        "warmup_steps": 0,
        "decay_fraction": 0.2,
        "decay_shape": "1-sqrt",
        "final_fraction": 0.0,
    }


@pytest.mark.parametrize(
    ("kind", "options", "words"),
    [
        ("cosin", {}, "schedule.kind='cosin' .*Did you mean 'cosine'"),
        ("cosine", {"warmup": 3}, "schedule.warmup .*Did you mean 'warmup_steps'"),
        ("cosine", {"decay_fraction": 0.1}, r"schedule\.decay_fraction is not an option"),
        ("wsd", {"decay_shape": "sqrt"}, "schedule.decay_shape='sqrt' .*Did you mean '1-sqrt'"),
        ("wsd", {"decay_fraction": 0.0}, "decay_fraction is 0.0.*'constant'"),
        ("wsd", {"decay_fraction": 1.5}, "decay_fraction is 1.5"),
        ("wsd", {"warmup_steps": 900}, "warmup_steps is 900 .* starts at step 800 of 1000"),
        ("constant", {"warmup_steps": 1000}, "warmup_steps is 1000; .*below .*1000"),
        ("cosine", {"warmup_steps": -1}, "warmup_steps is -1"),
        ("cosine", {"final_fraction": 2.0}, "final_fraction is 2.0"),
    ],
)
def test_a_wrong_schedule_is_one_sentence(kind, options, words):
    with pytest.raises(ValueError, match=words):
        schedules.build(kind, PEAK, TOTAL, **options)


def test_wrong_peak_and_length_are_sentences():
    with pytest.raises(ValueError, match=r"optimizer\.learning_rate is 0"):
        schedules.build("constant", 0, TOTAL)
    with pytest.raises(ValueError, match="number of steps is 0"):
        schedules.build("constant", PEAK, 0)
