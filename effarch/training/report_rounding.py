"""Curves of what rounding did to each layer over the steps of a run: see `rounding_metrics`."""

from collections.abc import Mapping, Sequence

import numpy as np

from effarch.training import report_figures
from effarch.training.report_figures import Curve, Panel
from effarch.training.report_runs import Run

_FIGURES = {
    "x_error": ("Rounding error of activations", "|Q(x) - x| / |x|"),
    "w_error": ("Rounding error of weights", "|Q(w) - w| / |w|"),
    "e_error": ("Rounding error of gradients", "|Q(e) - e| / |e|"),
    "x_clipped": ("Clipped activations", "share of entries"),
    "w_clipped": ("Clipped weights", "share of entries"),
    "e_clipped": ("Clipped gradients", "share of entries"),
    "e_underflow": ("Gradients rounded to zero", "share of entries"),
    "cosine": ("Gradient against the one without rounding", "cosine"),
}
"""Figure of a layer -> (title, unit)."""


def panels(runs: Sequence[Run]) -> list[Panel]:
    """Means over a layer's products: of one run a curve a layer, of several a curve a run."""
    found = []
    for name, (title, unit) in _FIGURES.items():
        rows: dict[str, list[tuple[float, float]]] = {}
        if len(runs) > 1:  # A run has its colour also where others have no values.
            rows = {run.name: [] for run in runs}
        for run in runs:
            for record in run.rounding:
                means = _by_layer(record, name)
                if len(runs) > 1 and means:
                    means = {run.name: float(np.mean(list(means.values())))}
                for label, value in means.items():
                    rows.setdefault(label, []).append((record["step"], value))
        curves = [
            _curve(label, index, points) for index, (label, points) in enumerate(rows.items())
        ]
        curves = [curve for curve in curves if len(curve.steps)]
        if any(curve.values.any() for curve in curves):
            found.append(Panel(title, unit, curves, "zero"))
    return found


def _by_layer(record: Mapping, name: str) -> dict[str, float]:
    """`layer 3` -> the mean of the values called `layers/3/.../name`."""
    values: dict[int, list[float]] = {}
    for path, value in record.items():
        if path.endswith(f"/{name}"):
            values.setdefault(int(path.split("/")[1]), []).append(value)
    return {f"layer {layer}": float(np.mean(values[layer])) for layer in sorted(values)}


def _curve(label: str, index: int, points: Sequence[tuple[float, float]]) -> Curve:
    steps, values = np.asarray(points, np.float64).reshape(-1, 2).T
    finite = np.isfinite(values)
    style = ("-", "--", "-.", ":")[index // len(report_figures.COLOURS) % 4]
    return Curve(label, report_figures.colour(index), steps[finite], values[finite], style=style)
