"""The picture of IsoFLOP curves: loss against size at each budget, best size against FLOPs."""

import os
from collections.abc import Mapping

import numpy as np

from effarch import experiment_record
from effarch.scaling import tables
from effarch.scaling.optima import Optima

MARKERS, LINES = "osD^v", ("-", "--", ":", "-.")


def draw(
    path: str | os.PathLike, found: Mapping[str, Optima], *, size: str = "size", loss: str = "loss"
) -> None:
    """Writes a PNG; colours are budgets, markers architectures. `size` and `loss` name the axes."""
    budgets = sorted({float(c) for optima in found.values() for c in optima.runs["flops"]})
    colors = {budget: f"C{number % 10}" for number, budget in enumerate(budgets)}
    with experiment_record.panels(path, 2, size=(10, 4)) as (left, right):
        for number, (name, optima) in enumerate(found.items()):
            marker, line = MARKERS[number % len(MARKERS)], LINES[number % len(LINES)]
            _losses(left, optima, colors, marker, line)
            _growth(right, name, optima, marker, line)
        for budget, color in colors.items():
            left.plot([], [], color=color, label=f"{budget:.0e} FLOPs")
        left.set(xlabel=size, ylabel=loss, xscale="log")
        left.legend(frameon=False, fontsize=8)
        right.set(xlabel="training FLOPs", ylabel="best size N*")
        if any(len(optima.best.flops) for optima in found.values()):
            right.set(xscale="log", yscale="log")
            right.set_xticks(budgets, [f"{budget:.0e}" for budget in budgets])
            right.set_xticks([], minor=True)
            right.legend(frameon=False, fontsize=8)


def _losses(panel, optima: Optima, colors: dict, marker: str, line: str) -> None:
    for budget in np.unique(optima.runs["flops"]):
        rows = tables.where(optima.runs, flops=budget)
        style = dict(color=colors[budget], marker=marker, ms=4, ls="", mfc="none")
        panel.plot(rows["size"], rows["loss"], **style)
    best = optima.best
    for budget, size, loss, bend in zip(best.flops, best.size, best.loss, best.curvature):
        across = np.geomspace(size / 4, size * 4, 60)
        curve = loss + bend * np.log(across / size) ** 2
        panel.plot(across, curve, color=colors[budget], ls=line, lw=1)


def _growth(panel, name: str, optima: Optima, marker: str, line: str) -> None:
    best, law = optima.best, optima.law()
    if law:
        panel.plot(best.flops, law(best.flops), color="C3", ls=line, lw=1)
        name = f"{name}: a = {law.exponent:.2f}"
    panel.plot(best.flops, best.size, marker, color="C3", mfc="none", label=name)
