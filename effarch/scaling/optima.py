"""The best size at each budget of an architecture, its growth, and what one architecture saves.

A table of runs has the columns flops, size and loss; runs of one budget have equal flops
(`isoflop.same_budgets`).
"""

import dataclasses
from collections.abc import Mapping

import numpy as np

from effarch.scaling import isoflop, multiplier, tables


@dataclasses.dataclass(frozen=True)
class Optima:
    """Of one architecture."""

    runs: tables.Table
    """One row a budget and size."""
    best: isoflop.Vertices
    resampled: list[isoflop.Vertices]
    """The same under the noise between seeds; [] where it is not known."""

    def law(self) -> isoflop.PowerLaw | None:
        """N* = k C^a; None with fewer than two budgets that have an optimum."""
        return (
            isoflop.power_law(self.best.flops, self.best.size) if len(self.best.flops) > 1 else None
        )


def find(
    groups: Mapping[str, tables.Table],
    noise: float | None = None,
    *,
    min_side: int = 2,
    resamples: int = 400,
) -> tuple[dict[str, Optima], float | None]:
    """(architecture -> its optima, the noise behind their bands).

    Runs of one budget and size are seeds, and are averaged. `noise` is the standard deviation of the
    loss between seeds, by default that of the runs; None where there are none, without `resampled`.
    """
    averaged = {name: _averaged(runs) for name, runs in groups.items()}
    if noise is None:
        squares, freedom = np.sum([seeds for _, seeds in averaged.values()], axis=0)
        noise = float(np.sqrt(squares / freedom)) if freedom else None
    found = {}
    for seed, (name, (runs, _)) in enumerate(averaged.items()):
        columns = (runs["flops"], runs["size"], runs["loss"])
        best = isoflop.vertices(*columns, min_side=min_side)
        draws = {"resamples": resamples if noise else 0, "seed": seed, "min_side": min_side}
        spread = isoflop.resampled(*columns, lambda x: np.full(len(x), noise or 0.0), **draws)
        found[name] = Optima(runs, best, spread)
    return found, noise


def _averaged(runs: tables.Table) -> tuple[tables.Table, tuple[float, int]]:
    """(the means of seeds; the squares of their losses' distances from them, degrees of freedom)."""
    cells = np.stack([runs["flops"], runs["size"]], axis=1)
    _, first, place = np.unique(cells, axis=0, return_index=True, return_inverse=True)
    place, counts = place.ravel(), np.bincount(place.ravel())
    means = {name: np.bincount(place, column) / counts for name, column in runs.items()}
    means |= {name: runs[name][first] for name in ("flops", "size")}
    squares = np.sum((runs["loss"] - means["loss"][place]) ** 2)
    return means, (float(squares), int(np.sum(counts - 1)))


@dataclasses.dataclass(frozen=True)
class Saving:
    """The second architecture needs `ratio` times the first one's FLOPs for this loss."""

    loss: float
    flops: float
    """Of the second, whose best model has this loss."""
    ratio: float
    band: tuple[float, float] | None
    """Of the ratio, 95 %; None where the noise is not known."""


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
            multiplier.band(first.resampled, second.resampled, loss) if first.resampled else None,
        )
        for flops, loss in zip(second.best.flops, second.best.loss)
        if covered.min() <= loss <= covered.max()
    ]
