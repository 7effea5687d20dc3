"""In which order do number formats stand at one size: python experiments/precision_law/orders.py

Trains what is missing in the folder of runs, which `own.py` shares, and writes results/orders.json and
two tables of README.md from the seeds that are there: 11 runs a seed, width 96, 800 steps.
"""

import pathlib

import numpy as np

from effarch import experiment_record, experiment_runs
from effarch.scaling import statistics

HERE = pathlib.Path(__file__).resolve().parent
FORMATS = (
    *("none", "quest8", "quest4", "quest2", "quest1", "mxfp4_forward", "stochastic_forward"),
    *("quartet", "nearest_backward", "pma_backward", "quest_backward"),
)
ORDERS = {
    "rounding costs": ("none", "quest8"),
    "8 bits no worse than 4": ("quest8", "quest4"),
    "4 bits before 2": ("quest4", "quest2"),
    "2 bits before 1": ("quest2", "quest1"),
    "forward: QuEST's rule before stochastic": ("mxfp4_forward", "stochastic_forward"),
    "backward: stochastic before QuEST's rule": ("quartet", "quest_backward"),
    "backward: nearest before QuEST's rule": ("nearest_backward", "quest_backward"),
}
"""Claim -> (the format of lower loss, the other); arXiv 2502.05003, the last three of 2505.14669."""
WIDTH, STEPS = 96, 800


def main() -> None:
    options = experiment_runs.parser(__doc__, runs="runs/precision_law", seeds=3).parse_args()
    sizes = {"width": WIDTH, "steps": STEPS}
    cells = experiment_runs.over_seeds([{"format": x, **sizes} for x in FORMATS], options.seeds)
    found = [
        {**cell, "loss": summary["val/loss"], "seconds": summary["seconds"]}
        for cell, _, summary in experiment_runs.finished(cells, _flags, options)
    ]
    if any(_gaps(found, *pair).size for pair in ORDERS.values()):
        _write(found)


def _flags(seed: int, **cell) -> list[str]:
    return experiment_runs.flags(HERE / "grid.py", seed, **cell)


def _gaps(found: list[dict], lower: str, higher: str) -> np.ndarray:
    """Loss of the one minus that of the other, on the seeds that both have."""
    cells = {"format": lower}, {"format": higher}
    return np.subtract(*experiment_runs.paired(found, "loss", *cells))


def _write(found: list[dict]) -> None:
    readme = HERE / "README.md"
    losses = experiment_runs.figures_by(found, "loss", "format")
    rows = [
        [
            name,
            len(loss),
            f"{loss.mean():.4f}",
            experiment_record.interval(gap) if gap.any() else "",
        ]
        for name, loss in losses.items()
        for gap in [_gaps(found, name, "none")]
    ]
    header = ["format", "seeds", "loss", "minus that of none"]
    experiment_record.write_table(readme, "formats", header, rows)
    gaps = {claim: _gaps(found, *pair) for claim, pair in ORDERS.items()}
    rows = [
        [claim, *ORDERS[claim], len(gap), experiment_record.interval(gap), _judged(gap)]
        for claim, gap in gaps.items()
    ]
    header = ["claim", "lower loss", "higher loss", "seeds", "difference, 95 % interval", "verdict"]
    experiment_record.write_table(readme, "orders", header, rows)
    experiment_record.write_text(readme, "orders_verdict", _verdict(found, gaps))
    results = {"runs": found, "orders": {claim: gap.tolist() for claim, gap in gaps.items()}}
    experiment_record.write_json(HERE / "results/orders.json", results)


def _judged(gap: np.ndarray) -> str:
    if not len(gap):
        return "untested"
    if len(gap) == 1:
        return "so on one seed" if gap[0] < 0 else "not so on one seed"
    found = statistics.over_seeds(gap)
    if not found.excludes_zero:
        return "undecided"
    return "confirmed" if found.mean < 0 else "refuted"


def _verdict(found: list[dict], gaps: dict[str, np.ndarray]) -> str:
    judged = {}
    for claim, gap in gaps.items():
        judged.setdefault(_judged(gap), []).append(claim)
    told = "; ".join(
        f"{len(claims)} {word} ({', '.join(claims)})" for word, claims in judged.items()
    )
    return f"{experiment_record.effort(found)} **Verdict.** Of {len(gaps)} claims {told}."


if __name__ == "__main__":
    main()
