"""Compute-optimal sizes from measured runs: IsoFLOP vertices, envelope, power laws.

Hoffmann et al., arXiv 2203.15556: approach 1 takes the lower envelope of training curves, approach 2
the vertex of a parabola of loss in ln N at each budget; the sizes then follow N* = k C^a.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import scipy.interpolate


@dataclasses.dataclass(frozen=True)
class PowerLaw:
    """y = coefficient x^exponent."""

    coefficient: float
    exponent: float
    exponent_se: float
    """Standard error from the scatter around the line; nan for two points."""

    def __call__(self, x: np.ndarray) -> np.ndarray:
        return self.coefficient * np.asarray(x) ** self.exponent


@dataclasses.dataclass(frozen=True)
class Vertices:
    """The optimum at each budget that has one, in order of FLOPs; arrays [budgets]."""

    flops: np.ndarray
    size: np.ndarray
    loss: np.ndarray
    curvature: np.ndarray
    """Of the parabola, loss + curvature (ln N - ln N*)^2."""
    dropped: tuple[float, ...]
    """Budgets without an accepted vertex."""


def power_law(x: np.ndarray, y: np.ndarray, weights: np.ndarray | None = None) -> PowerLaw:
    """Least squares of ln y on ln x; weights are 1 / variance of ln y."""
    log_x, log_y = np.log(x), np.log(y)
    if len(log_x) < 2:
        raise ValueError(f"a power law needs 2 points, there are {len(log_x)}; add budgets.")
    w = np.ones(len(log_x)) if weights is None else np.asarray(weights, np.float64)
    mean_x, mean_y = np.average(log_x, weights=w), np.average(log_y, weights=w)
    spread = np.sum(w * (log_x - mean_x) ** 2)
    exponent = np.sum(w * (log_x - mean_x) * (log_y - mean_y)) / spread
    rest = log_y - mean_y - exponent * (log_x - mean_x)
    freedom = len(log_x) - 2
    se = np.sqrt(np.sum(w * rest**2) / freedom / spread) if freedom else np.nan
    return PowerLaw(float(np.exp(mean_y - exponent * mean_x)), float(exponent), float(se))


def same_budgets(flops: np.ndarray, *, within: float = 0.05) -> np.ndarray:
    """The budget of each run [runs], where runs miss theirs a little since steps are whole numbers.

    Runs are of one budget if, in order of FLOPs, each has at most this share more than the one before;
    the budget is their geometric mean.
    """
    flops = np.asarray(flops, np.float64)
    order = np.argsort(flops)
    logs = np.log(flops[order])
    group = np.cumsum(np.diff(logs, prepend=logs[0]) > np.log1p(within))
    means = np.bincount(group, logs) / np.bincount(group)
    budgets = np.empty_like(flops)
    budgets[order] = np.exp(means[group])
    return budgets


def vertices(
    flops: np.ndarray,
    sizes: np.ndarray,
    losses: np.ndarray,
    *,
    window: int = 2,
    min_side: int = 2,
) -> Vertices:
    """The vertex of a parabola of loss in ln N at each budget.

    The three are [runs]; runs of one budget have equal `flops` (`same_budgets`).

    Args:
      window: the parabola goes through the lowest run and so many neighbours on each side.
      min_side: a budget is dropped if its lowest run or its vertex has fewer runs on a side.
    """
    found, dropped = [], []
    for budget in np.unique(flops):
        rows = np.flatnonzero(flops == budget)
        rows = rows[np.argsort(sizes[rows])]
        lowest = int(np.argmin(losses[rows]))
        near = rows[max(lowest - window, 0) : lowest + window + 1]
        log_size, loss, curvature = _vertex(np.log(sizes[near]), losses[near])
        below = min(lowest, int(np.sum(np.log(sizes[rows]) < log_size)))
        above = min(len(rows) - 1 - lowest, int(np.sum(np.log(sizes[rows]) > log_size)))
        if len(near) >= 3 and min(below, above) >= min_side:
            found.append((budget, np.exp(log_size), loss, curvature))
        else:
            dropped.append(float(budget))
    return Vertices(*np.array(found).reshape(-1, 4).T, dropped=tuple(dropped))


def akima_optimum(
    sizes: np.ndarray,
    losses: np.ndarray,
    noise: Callable[[np.ndarray], np.ndarray],
    *,
    resamples: int = 1000,
    seed: int = 0,
) -> tuple[float, float] | None:
    """(median N*, standard deviation of ln N*) of one budget under the noise between seeds.

    Porian et al., arXiv 2406.19146: Akima interpolation of ln loss in ln N on a grid 25 times finer,
    the argmin of each noisy resample. None if the argmin of the measured losses is at an end.
    `noise(losses)` is the standard deviation of the loss between seeds.
    """
    order = np.argsort(sizes)
    log_n, loss = np.log(sizes[order]), losses[order]
    fine = np.interp(
        np.linspace(0, len(log_n) - 1, 25 * (len(log_n) - 1) + 1), np.arange(len(log_n)), log_n
    )
    draw = np.random.default_rng(seed).standard_normal((resamples, len(loss)))
    noisy = np.concatenate([loss[None], loss + noise(loss) * draw])
    curves = scipy.interpolate.Akima1DInterpolator(log_n, np.log(noisy), axis=1)(fine)
    best = np.argmin(curves, axis=1)
    if best[0] in (0, len(fine) - 1):
        return None
    return float(np.exp(np.median(fine[best[1:]]))), float(np.std(fine[best[1:]]))


def resampled(
    flops: np.ndarray,
    sizes: np.ndarray,
    losses: np.ndarray,
    noise: Callable[[np.ndarray], np.ndarray],
    *,
    resamples: int = 200,
    seed: int = 0,
    **options,
) -> list[Vertices]:
    """The vertices under the noise between seeds, added to every loss anew in each resample.

    `noise(losses)` is the standard deviation between seeds; `options` go to `vertices`.
    """
    draw, std = np.random.default_rng(seed), noise(losses)
    return [
        vertices(flops, sizes, losses + std * draw.standard_normal(len(losses)), **options)
        for _ in range(resamples)
    ]


def exponent_band(resamples: Sequence[Vertices]) -> tuple[float, float]:
    """The 95 % interval of the exponent of N* over vertices that were `resampled`.

    Raises ValueError if none of them has two budgets with a vertex.
    """
    exponents = [
        power_law(found.flops, found.size).exponent for found in resamples if len(found.flops) > 1
    ]
    if not exponents:
        raise ValueError(
            "no resample of the budgets left two with a vertex; add budgets, or sizes beyond the lowest "
            "losses."
        )
    low, high = np.quantile(exponents, (0.025, 0.975))
    return float(low), float(high)


def envelope(
    flops: np.ndarray, sizes: np.ndarray, losses: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The lowest loss that any training curve reaches, at log-spaced FLOPs: (flops, size, loss).

    Rows are logged points [rows]; those of one run share their size. Losses between two logged points
    are interpolated in ln C and ln L. Ends, where the smallest or largest size wins, are left out.
    """
    order = np.unique(sizes)
    grid = np.geomspace(flops.min(), flops.max(), 200)
    curves = np.full((len(order), len(grid)), np.inf)
    for row, size in enumerate(order):
        run = np.flatnonzero(sizes == size)
        run = run[np.argsort(flops[run])]
        inside = (grid >= flops[run[0]]) & (grid <= flops[run[-1]])
        log_loss = np.interp(np.log(grid[inside]), np.log(flops[run]), np.log(losses[run]))
        curves[row, inside] = np.exp(log_loss)
    best = np.argmin(curves, axis=0)
    inner = (best > 0) & (best < len(order) - 1)
    return grid[inner], order[best[inner]], curves.min(axis=0)[inner]


def _vertex(log_sizes: np.ndarray, losses: np.ndarray) -> tuple[float, float, float]:
    """(ln N*, loss, curvature) at the vertex; (-inf, nan, nan) where the parabola opens downward."""
    if len(log_sizes) < 3:
        return -np.inf, np.nan, np.nan
    centre = log_sizes.mean()
    curve, slope, level = np.polyfit(log_sizes - centre, losses, 2)
    if curve <= 0:
        return -np.inf, np.nan, np.nan
    return centre - slope / (2 * curve), level - slope**2 / (4 * curve), curve
