"""How many times the training FLOPs one architecture needs for a loss that another reaches.

Each architecture's lowest losses at its budgets follow L = E + k C^-p; E is that of the text and shared.
"""

from collections.abc import Iterable, Sequence

import numpy as np
import scipy.optimize

from effarch.scaling import isoflop

Curve = isoflop.Vertices
"""Its `flops` and `loss` [budgets] are the points of the curve."""
LEAST = 3
"""Budgets of a curve: two curves have five parameters."""


def compute_multiplier(first: Curve, second: Curve, loss: float) -> float:
    """C of the second over C of the first at equal loss; above 1 the first is cheaper.

    Raises ValueError for a loss that one of them did not reach or was always below, and for fewer than
    three budgets of either.
    """
    for curve in (first, second):
        if len(curve.flops) < LEAST:
            raise ValueError(
                f"a curve with {len(curve.flops)} budgets; a compute multiplier needs {LEAST} of each."
            )
    low = max(curve.loss.min() for curve in (first, second))
    high = min(curve.loss.max() for curve in (first, second))
    if not low <= loss <= high:
        raise ValueError(
            f"loss={loss:.4f} is outside {low:.4f} to {high:.4f}, which both curves cover; choose one "
            "inside, or train budgets that reach it."
        )
    return _ratio((first, second), loss)


def band(firsts: Iterable[Curve], seconds: Iterable[Curve], loss: float) -> tuple[float, float]:
    """The 95 % interval of the multiplier over pairs of resampled curves (`isoflop.resampled`).

    Pairs that lost a budget's vertex to the noise, so that fewer than three are left, do not count.
    """
    ratios = [
        _ratio(pair, loss)
        for pair in zip(firsts, seconds)
        if min(len(curve.flops) for curve in pair) >= LEAST
    ]
    if not ratios:
        raise ValueError(f"no pair of resampled curves has {LEAST} budgets each; add budgets.")
    low, high = np.quantile(ratios, (0.025, 0.975))
    return float(low), float(high)


def _ratio(curves: Sequence[Curve], loss: float) -> float:
    least = min(*(curve.loss.min() for curve in curves), loss)
    gaps = np.geomspace(1e-3, 1, 40) * least  # of E below the lowest loss
    costs = [_cost(gap, curves, least) for gap in gaps]
    near = int(np.argmin(costs))
    found = scipy.optimize.minimize_scalar(
        _cost,
        bounds=(gaps[max(near - 1, 0)], gaps[min(near + 1, len(gaps) - 1)]),
        args=(curves, least),
        method="bounded",
        options={"xatol": 1e-9},
    )
    irreducible = least - found.x
    first, second = (
        (np.log(loss - irreducible) - np.log(law.coefficient)) / law.exponent
        for law in (_law(curve, irreducible) for curve in curves)
    )
    return float(np.exp(second - first))


def _cost(gap: float, curves: Sequence[Curve], least: float) -> float:
    """The sum of squared errors of ln L, each curve at its best under E = least - gap."""
    irreducible = least - gap
    return sum(
        np.sum(np.log((irreducible + _law(curve, irreducible)(curve.flops)) / curve.loss) ** 2)
        for curve in curves
    )


def _law(curve: Curve, irreducible: float) -> isoflop.PowerLaw:
    """k C^-p through L - E, weighted so that errors of ln L count equally."""
    rest = curve.loss - irreducible
    return isoflop.power_law(curve.flops, rest, weights=(rest / curve.loss) ** 2)
