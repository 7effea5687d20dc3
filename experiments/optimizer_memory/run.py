"""Loss and bytes of optimizer state: trains what is missing, then writes tables, figure and verdict.

    python experiments/optimizer_memory/run.py --seeds=3 --parallel=1

Finished runs in --runs are kept; every beginning of the runs is a result: all optimizers, then the next
seed. --write_only trains nothing.
"""

import pathlib

import grid
import matplotlib
import matplotlib.pyplot as plt
import numpy as np

from effarch import experiment_record, experiment_runs
from effarch.scaling import statistics

HERE = pathlib.Path(__file__).resolve().parent
BASE = "adamw"


def main() -> None:
    flags = experiment_runs.parser(__doc__, runs="runs/optimizer_memory", seeds=3)
    options = flags.parse_args()
    cells = [(kind, seed) for seed in range(options.seeds) for kind in grid.OPTIMIZERS]
    runs = {options.runs / f"{kind}-seed{seed}": (kind, seed) for kind, seed in cells}
    summaries = experiment_runs.collect(
        {folder: _flags(*cell) for folder, cell in runs.items()}, options
    )
    found = {kind: [] for kind in grid.OPTIMIZERS}
    for folder, summary in summaries.items():
        kind, seed = runs[folder]
        names = ("optimizer_state_bytes", "params_total", "tokens", "step_seconds", "seconds")
        figures = {name: summary[name] for name in names if name in summary}
        found[kind].append({"seed": seed, "loss": summary["val/loss"], **figures})
    found = {kind: rows for kind, rows in found.items() if rows}
    if BASE in found:
        experiment_record.write_json(HERE / "results/runs.json", found)
        _write(found)
        _draw(found)


def _flags(kind: str, seed: int) -> list[str]:
    return [f"--config={HERE / 'grid.py'}:optimizer={kind}", f"--config.seed={seed}"]


def _gaps(found: dict, kind: str) -> np.ndarray:
    """Loss minus AdamW's on the seeds that both have."""
    losses = [{row["seed"]: row["loss"] for row in found[name]} for name in (kind, BASE)]
    return np.array([losses[0][seed] - losses[1][seed] for seed in losses[0] if seed in losses[1]])


def _interval(values: np.ndarray) -> str:
    if len(values) < 2:
        return f"{values.mean():+.4f}" if len(values) else ""
    found = statistics.over_seeds(values)
    return f"{found.mean:+.4f} ({found.low:+.4f} to {found.high:+.4f})"


def _per_parameter(run: dict) -> float:
    return run["optimizer_state_bytes"] / run["params_total"]


def _write(found: dict) -> None:
    rows = [
        [
            kind,
            len(runs),
            f"{grid.OPTIMIZERS[kind][0]:g}",
            f"{runs[0]['optimizer_state_bytes']:,}",
            f"{_per_parameter(runs[0]):.2f}",
            f"{np.mean([run['loss'] for run in runs]):.4f}",
            _interval(_gaps(found, kind)) if kind != BASE else "",
        ]
        for kind, runs in found.items()
    ]
    header = ["optimizer", "seeds", "rate", "bytes of state", "bytes a parameter", "loss"]
    experiment_record.write_table(
        HERE / "README.md", "states", [*header, "minus AdamW's loss"], rows
    )
    experiment_record.write_text(HERE / "README.md", "verdict", _verdict(found))


def _verdict(found: dict) -> str:
    sentences = []
    for kind in (name for name in found if name != BASE):
        gaps, share = _gaps(found, kind), _per_parameter(found[kind][0])
        part = share / _per_parameter(found[BASE][0])
        word = f"{gaps.mean():+.4f} nats on {len(gaps)} seed(s)"
        if len(gaps) > 1:
            interval = statistics.over_seeds(gaps)
            lower = "lower" if interval.mean < 0 else "higher"
            word = f"{lower} loss" if interval.excludes_zero else "no difference in loss"
        sentences.append(f"{kind} {word} with {100 * part:.0f}% of AdamW's state")
    minutes = sum(run["seconds"] for runs in found.values() for run in runs) / 60
    count = sum(map(len, found.values()))
    return f"{count} runs, {minutes:.0f} min in all. **Verdict.** {'; '.join(sentences)}."


def _draw(found: dict) -> None:
    matplotlib.use("Agg")
    figure, panel = plt.subplots(figsize=(6, 4), layout="constrained")
    for index, (kind, runs) in enumerate(found.items()):
        sizes = [_per_parameter(run) for run in runs]
        panel.plot(sizes, [run["loss"] for run in runs], "o", ms=4, color=f"C{index}", label=kind)
    panel.set(
        xlabel="bytes of optimizer state a parameter", ylabel="validation loss, nats per token"
    )
    panel.set_xlim(left=0)
    panel.legend(frameon=False, fontsize=8)
    (HERE / "figures").mkdir(exist_ok=True)
    figure.savefig(HERE / "figures/states.png", dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    main()
