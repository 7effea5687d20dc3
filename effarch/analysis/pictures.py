"""Figures of analyses as PNG files."""

import pathlib
from collections.abc import Sequence

import numpy as np


def write(figures: Sequence[dict], stem: pathlib.Path) -> list[pathlib.Path]:
    """One file a figure, STEM-1.png and so on; `figures` as in `runs`."""
    from matplotlib.figure import Figure  # slow to import

    paths = []
    for number, spec in enumerate(figures, 1):
        drawing = Figure(figsize=(6, 3.6), layout="constrained")
        axes = drawing.add_subplot()
        lowest = np.inf
        for curve in spec["curves"]:
            axes.plot(curve["x"], curve["y"], marker="o", markersize=3, label=curve["label"])
            lowest = min(lowest, np.min(curve["y"]))
        if spec["scale"] == "log" and lowest > 0:
            axes.set_yscale("log")
        elif spec["scale"] == "zero":
            axes.set_ylim(bottom=0)
        axes.set(title=spec["title"], xlabel=spec["across"], ylabel=spec["unit"])
        axes.grid(alpha=0.3)
        if len(spec["curves"]) > 1:
            axes.legend(frameon=False, fontsize=8)
        paths.append(stem.with_name(f"{stem.name}-{number}.png"))
        drawing.savefig(paths[-1], dpi=120)
    return paths
