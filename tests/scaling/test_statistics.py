"""Intervals and the paired bootstrap, against counting and closed forms."""

import numpy as np
import pytest

from effarch.scaling import statistics


def test_over_seeds_is_students_interval():
    found = statistics.over_seeds([3.01, 3.03, 3.02])
    assert found.mean == pytest.approx(3.02)
    assert found.std == pytest.approx(0.01)
    half = 4.30265 * 0.01 / 3**0.5  # the 97.5 % point of t with 2 degrees of freedom
    assert (found.low, found.high) == pytest.approx((3.02 - half, 3.02 + half), rel=1e-6)


def test_students_interval_covers_as_often_as_it_says():
    draw = np.random.default_rng(0)
    hits = [
        found.low <= 0 <= found.high
        for found in (statistics.over_seeds(draw.normal(size=3), level=0.8) for _ in range(1000))
    ]
    assert np.mean(hits) == pytest.approx(0.8, abs=0.04)


def test_pairs_cancel_what_they_share():
    draw = np.random.default_rng(1)
    shared = draw.normal(3, 0.5, 24)
    first = shared + draw.normal(0, 0.01, 24)
    second = shared + 0.02 + draw.normal(0, 0.01, 24)
    found = statistics.paired_bootstrap(first, second)
    assert found.mean == pytest.approx(np.mean(first - second))
    assert found.excludes_zero
    assert found.high < 0
    # Large samples: the percentile interval is the normal one.
    half = 1.96 * np.std(first - second) / 24**0.5
    assert (found.low, found.high) == pytest.approx(
        (found.mean - half, found.mean + half), abs=1e-3
    )
    unpaired = statistics.paired_bootstrap(first, draw.permutation(second))
    assert not unpaired.excludes_zero


def test_the_bootstrap_of_two_pairs_is_the_enumeration():
    """Resamples of {0, 1}: means 0, 1/2, 1 with probabilities 1/4, 1/2, 1/4."""
    found = statistics.paired_bootstrap([0.0, 1.0], [0.0, 0.0], level=0.4)
    assert (found.low, found.high) == (0.5, 0.5)
    wide = statistics.paired_bootstrap([0.0, 1.0], [0.0, 0.0], level=0.6)
    assert (wide.low, wide.high) == (0.0, 1.0)


def test_verdict():
    base = np.array([3.00, 3.10, 3.20])
    lower = statistics.verdict(base - [0.05, 0.06, 0.04], base, names=("gdn", "attention"))
    assert lower.startswith("gdn is lower than attention by 0.0500")
    assert statistics.verdict(base, base - 0.05 - [0, 0.01, -0.01]).startswith("B is lower than A")
    assert statistics.verdict(np.add(base, [0.05, -0.05, 0.01]), base).startswith("no difference")


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: statistics.over_seeds([3.0]), "1 values, 1 of them finite"),
        (lambda: statistics.over_seeds([3.0, np.nan]), "2 values, 1 of them finite"),
        (lambda: statistics.paired_bootstrap([1, 2], [1, 2, 3]), "one of each a pair"),
    ],
)
def test_values_without_an_interval_are_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()
