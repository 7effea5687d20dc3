"""Curves of what layers report in each step: sparsity, routing, decays. Means over layers.

What a layer of one's own reports as `metric/NAME` or `loss/NAME` is drawn under its name.
"""

from collections.abc import Sequence

from effarch.training import report_figures
from effarch.training.report_figures import Panel
from effarch.training.report_runs import Run

_FIGURES = {
    "metric/active_fraction": ("Active neurons", "share of neurons"),
    "metric/attended_keys": ("Attended keys", "keys of a query"),
    "metric/token_sparsity": ("Experts idle for a token", "share of experts"),
    "metric/chunk_sparsity_8": ("Experts idle for 8 tokens in a row", "share of experts"),
    "metric/max_vio": ("Load of the fullest expert", "load / even load - 1"),
    "metric/min_load": ("Load of the emptiest expert", "load / even load"),
    "metric/unused_experts": ("Unused experts", "share of experts"),
    "metric/dropped": ("Dropped choices", "share of choices"),
    "metric/router_entropy": ("Entropy of the router", "share of the largest"),
    "metric/router_confidence": ("Highest probability of the router", "probability"),
    "metric/router_bias_max": ("Largest bias of the router", "bias"),
    "metric/latent_groups": ("Groups of latent experts used", "groups of a token"),
    "metric/delta_beta": ("Strength of writing", "beta"),
    "metric/delta_decay": ("What a delta rule's state keeps", "share in a step"),
    "metric/decay": ("What a state keeps", "share in a step"),
    "loss/router_balance": ("Balancing loss", "nats, added to the loss"),
}
"""Metric -> (title, unit)."""
_LEFT_OUT = (
    *("metric/max_vio_max", "metric/max_vio_window", "metric/load_entropy", "metric/dead_experts"),
    *("metric/chunk_loss", "metric/chunk_coef"),
)
"""Others tell the same."""


def panels(runs: Sequence[Run]) -> list[Panel]:
    """A panel for each metric that is not zero throughout; a curve for each run that has it."""
    names = dict.fromkeys(name for run in runs for record in run.train for name in record)
    others = [name for name in names if name.startswith(("metric/", "loss/"))]
    found = []
    for name in dict.fromkeys([*_FIGURES, *others]):
        curves = report_figures.over_runs(runs, "train", name, is_raw=True)
        if name not in _LEFT_OUT and any(curve.values.any() for curve in curves):
            scale = "zero" if name.startswith("loss/") else "linear"
            found.append(Panel(*_FIGURES.get(name, _words(name)), curves, scale))
    return found


def _words(name: str) -> tuple[str, str]:
    kind, _, rest = name.partition("/")
    words = rest.replace("_", " ")
    return words.capitalize(), "nats, added to the loss" if kind == "loss" else words
