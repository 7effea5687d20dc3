"""The best size at each budget of an architecture, its growth, and what one architecture saves.

A table of runs has the columns flops, size and loss; runs of one budget have equal flops
(`isoflop.same_budgets`).
"""

import dataclasses

import numpy as np

from effarch.scaling import isoflop, multiplier, tables


@dataclasses.dataclass(frozen=True)
class Optima:
    """Of one architecture."""

    runs: tables.Table
    """One row a budget and size."""
    best: isoflop.Vertices
    resampled: list[isoflop.Vertices]
    """The same under the noise between seeds."""

    def law(self) -> isoflop.PowerLaw | None:
        """N* = k C^a; None with fewer than two budgets that have an optimum."""
        return (
            isoflop.power_law(self.best.flops, self.best.size) if len(self.best.flops) > 1 else None
        )

    def exponent_band(self, level: float = 0.95) -> tuple[float, float]:
        """Of a. Raises ValueError if no resample leaves two budgets with an optimum."""
        return isoflop.exponent_band(self.resampled, level=level)


def averaged(runs: tables.Table) -> tuple[tables.Table, float]:
    """(the runs of a budget and size as one, their mean; the standard deviation between seeds).

    The deviation is pooled over all budgets and sizes with several runs; nan if there are none.
    """
    cells = np.stack([runs["flops"], runs["size"]], axis=1)
    _, first, place = np.unique(cells, axis=0, return_index=True, return_inverse=True)
    counts = np.bincount(place.ravel())
    means = {name: np.bincount(place.ravel(), column) / counts for name, column in runs.items()}
    means |= {name: runs[name][first] for name in ("flops", "size")}
    squares = np.sum((runs["loss"] - means["loss"][place.ravel()]) ** 2)
    freedom = np.sum(counts - 1)
    return means, float(np.sqrt(squares / freedom)) if freedom else np.nan


def find(
    runs: tables.Table, noise: float, *, min_side: int = 2, resamples: int = 400, seed: int = 0
) -> Optima:
    """The optima of averaged runs, and again with `noise` on every loss, a standard deviation."""
    columns = (runs["flops"], runs["size"], runs["loss"])
    resampled = isoflop.resampled(
        *columns,
        lambda losses: np.full(len(losses), noise),
        min_side=min_side,
        resamples=resamples,
        seed=seed,
    )
    return Optima(runs, isoflop.vertices(*columns, min_side=min_side), resampled)


@dataclasses.dataclass(frozen=True)
class Saving:
    """The second architecture needs `ratio` times the first one's FLOPs for this loss."""

    loss: float
    flops: float
    """Of the second, whose best model has this loss."""
    ratio: float
    band: tuple[float, float]


def savings(first: Optima, second: Optima) -> list[Saving]:
    """At each of the second's best losses that the first's curve covers; [] for too few budgets."""
    if min(len(first.best.flops), len(second.best.flops)) < multiplier.LEAST:
        return []
    covered = first.best.loss
    return [
        Saving(
            float(loss),
            float(flops),
            multiplier.compute_multiplier(first.best, second.best, loss),
            multiplier.band(first.resampled, second.resampled, loss),
        )
        for flops, loss in zip(second.best.flops, second.best.loss)
        if covered.min() <= loss <= covered.max()
    ]
