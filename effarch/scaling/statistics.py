"""Whether a difference between runs is one: intervals over seeds, the paired bootstrap.

Seeds vary initial parameters and data order. Two architectures are compared in pairs of the same seed
and budget, so that what a pair shares cancels.
"""

import dataclasses

import numpy as np
import scipy.stats


@dataclasses.dataclass(frozen=True)
class Interval:
    """A mean and the interval that holds it at a level of confidence."""

    mean: float
    low: float
    high: float
    std: float
    """Between the values, n - 1 in the denominator."""
    count: int

    @property
    def excludes_zero(self) -> bool:
        return self.low > 0 or self.high < 0


def over_seeds(values: np.ndarray, *, level: float = 0.95) -> Interval:
    """Student's interval for the mean of independent runs; for losses of 2 to 10 seeds."""
    values = _finite(values, least=2)
    std, count = float(values.std(ddof=1)), len(values)
    half = float(scipy.stats.t.ppf((1 + level) / 2, count - 1)) * std / np.sqrt(count)
    mean = float(values.mean())
    return Interval(mean, mean - half, mean + half, std, count)


def paired_bootstrap(
    first: np.ndarray,
    second: np.ndarray,
    *,
    level: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> Interval:
    """Percentile interval of mean(first - second) over (seed, budget) cells, or documents.

    first[i] and second[i] share seed and budget. Resamples draw cells with replacement. For fewer than
    about 8 cells it is too narrow; see `over_seeds` of the differences.
    """
    first, second = np.asarray(first, np.float64), np.asarray(second, np.float64)
    if first.shape != second.shape:
        raise ValueError(
            f"paired values have shapes {first.shape} and {second.shape}; give one of each a pair."
        )
    difference = _finite(first - second, least=2)
    draw = np.random.default_rng(seed)
    means = np.array([draw.choice(difference, len(difference)).mean() for _ in range(resamples)])
    tail = (1 - level) / 2
    low, high = map(float, np.quantile(means, (tail, 1 - tail)))
    std = float(difference.std(ddof=1))
    return Interval(float(difference.mean()), low, high, std, len(difference))


def verdict(first: np.ndarray, second: np.ndarray, names: tuple[str, str] = ("A", "B")) -> str:
    """One sentence on paired losses: which is lower, or that they cannot be told apart.

    A difference within 2 standard errors of the pairs is no difference.
    """
    difference = np.asarray(first, np.float64) - np.asarray(second, np.float64)
    found = over_seeds(difference)
    error = found.std / np.sqrt(found.count)
    if abs(found.mean) <= 2 * error:
        return (
            f"no difference: {names[0]} - {names[1]} = {found.mean:+.4f} +- {2 * error:.4f} "
            f"(2 standard errors, {found.count} pairs)"
        )
    lower, higher = names if found.mean < 0 else names[::-1]
    return (
        f"{lower} is lower than {higher} by {abs(found.mean):.4f} +- {2 * error:.4f} "
        f"(2 standard errors, {found.count} pairs)"
    )


def _finite(values: np.ndarray, *, least: int) -> np.ndarray:
    values = np.asarray(values, np.float64).ravel()
    if len(values) < least or not np.isfinite(values).all():
        raise ValueError(
            f"{len(values)} values, {int(np.isfinite(values).sum())} of them finite: an interval needs "
            f"at least {least}, all finite; add seeds or leave out runs that diverged."
        )
    return values
