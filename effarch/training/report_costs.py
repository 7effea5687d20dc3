"""Several runs at equal cost: their loss against tokens, FLOPs and time instead of steps."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from effarch.training import report_figures
from effarch.training.report_figures import Panel
from effarch.training.report_runs import Run, series

Cost = tuple[np.ndarray, np.ndarray]
"""Steps from 0 on, and what a run had cost by then; empty if it is not known."""
_SAME = 0.005
"""Costs of a step that differ by less than this part make no figure of their own."""


def panels(runs: Sequence[Run]) -> list[Panel]:
    """The validation loss, or the training loss where it was seldom validated, over each cost.

    A cost that a run does not know, or by which a step of every run is equally dear, is left out.
    """
    if len(runs) < 2:
        return []
    found = []
    for name, cost in _COSTS.items():
        costs = {run.name: cost(run) for run in runs}
        if all(len(steps) for steps, _ in costs.values()) and not _are_alike(costs):
            found.append(_panel(runs, name, costs))
    return [panel for panel in found if panel.curves]


def _panel(runs: Sequence[Run], name: str, costs: Mapping[str, Cost]) -> Panel:
    often = all(len(series(run.evals, "loss")[0]) > 2 for run in runs)
    kind = "evals" if often else "train"
    curves = [
        dataclasses.replace(curve, steps=np.interp(curve.steps, *costs[curve.label]))
        for curve in report_figures.over_runs(runs, kind, "loss", is_raw=not often)
    ]
    title = f"{'Validation' if often else 'Training'} loss at equal {name}"
    return Panel(title, "nats per token", curves, "loss", across=name)


def _are_alike(costs: Mapping[str, Cost]) -> bool:
    slopes = [values[-1] / steps[-1] for steps, values in costs.values()]
    return max(slopes) - min(slopes) <= _SAME * max(slopes)


def _tokens(run: Run) -> Cost:
    return _from_zero(*series(run.train, "tokens"))


def _flops(run: Run) -> Cost:
    recorded = series(run.train, "flops_model")
    if len(recorded[0]):
        return _from_zero(*recorded)
    total, steps = run.summary.get("flops_model"), run.summary.get("steps")  # of older runs
    if not total or not steps:
        return np.empty(0), np.empty(0)
    return np.array([0.0, steps]), np.array([0.0, total])


def _seconds(run: Run) -> Cost:
    """Of steps alone: without compilation, validation and checkpoints."""
    steps, each = series(run.train, "time/step_seconds")
    return _from_zero(steps, np.cumsum(each * np.diff(steps, prepend=0.0)))


def _from_zero(steps: np.ndarray, values: np.ndarray) -> Cost:
    if not len(steps):
        return steps, values
    return np.insert(steps, 0, 0.0), np.insert(values, 0, 0.0)


_COSTS: dict[str, Callable[[Run], Cost]] = {
    "tokens": _tokens,
    "model FLOPs": _flops,
    "seconds of training steps": _seconds,
}
