import numpy as np
import pytest

from effarch.data import mixture


@pytest.mark.parametrize(
    "weights",
    [
        (1.0,),
        (0.5, 0.3, 0.2),
        (0.613, 0.387),
        (0.4, 0.35, 0.25),
        (3, 0, 1),
        (1 / 3, 2 / 3),
        (0.9, 0.05, 0.02, 0.02, 0.01),
        (0.001, 0.999),
    ],
)
def test_every_prefix_is_within_one_window_of_its_share(weights):
    mixed = mixture.Mixture(weights)
    length = 5000
    drawn = [mixed.locate(i) for i in range(length)]
    counts = np.zeros((length + 1, len(weights)))
    for i, (source, ordinal) in enumerate(drawn):
        assert ordinal == counts[i, source]  # the n-th window of a source is its n-th
        counts[i + 1] = counts[i]
        counts[i + 1, source] += 1
    shares = np.asarray(weights) / sum(weights) * np.arange(length + 1)[:, None]
    assert np.abs(counts - shares).max() < 1 + 1e-6
    for n in (0, 1, 17, length):
        assert mixed.counts(n) == counts[n].tolist()


def test_weights_without_a_short_period():
    weights = (3_250_001, 104, 77_777)  # token counts
    mixed = mixture.Mixture(weights)
    assert mixed.period == mixture.MAX_PERIOD
    shares = np.asarray(weights) / sum(weights)
    assert np.abs(np.asarray(mixed.parts) / mixed.period - shares).max() <= 1 / mixed.period
    assert mixture.Mixture((1e9, 1)).parts[1] == 1
    assert mixed.locate(10**12)[1] <= 10**12
    sources = [mixed.locate(10**12 + i) for i in range(2000)]
    big = [ordinal for source, ordinal in sources if source == 0]
    assert big == list(range(big[0], big[0] + len(big)))
    assert mixed.counts(10**12)[0] == big[0]
