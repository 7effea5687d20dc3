"""Loss and bytes of optimizer state: trains what is missing, then writes tables, figure and verdict.

    python experiments/optimizer_memory/run.py --seeds=3 --parallel=1

Finished runs in --runs are kept; every beginning of the runs is a result: all optimizers, then the next
seed. --write_only trains nothing.
"""

import functools
import pathlib

import grid
import numpy as np

from effarch import experiment_record, experiment_runs
from effarch.scaling import statistics

HERE = pathlib.Path(__file__).resolve().parent
BASE = "adamw"


def main() -> None:
    options = experiment_runs.parser(__doc__, runs="runs/optimizer_memory", seeds=3).parse_args()
    cells = experiment_runs.over_seeds([{"optimizer": x} for x in grid.OPTIMIZERS], options.seeds)
    training = functools.partial(experiment_runs.flags, HERE / "grid.py")
    found = [
        cell | _figures(summary)
        for cell, _, summary in experiment_runs.finished(cells, training, options)
    ]
    if any(run["optimizer"] == BASE for run in found):
        experiment_record.write_json(HERE / "results/runs.json", {"runs": found})
        _write(found)
        _draw(found)


def _figures(summary: dict) -> dict:
    names = ("optimizer_state_bytes", "params_total", "tokens", "step_seconds", "seconds")
    figures = {name: summary[name] for name in names if name in summary}
    return {
        "loss": summary["val/loss"],
        "bytes_a_parameter": summary["optimizer_state_bytes"] / summary["params_total"],
        **figures,
    }


def _gaps(found: list[dict], kind: str) -> np.ndarray:
    """Loss minus AdamW's on the seeds that both have."""
    loss, of_base = experiment_runs.paired(found, "loss", {"optimizer": kind}, {"optimizer": BASE})
    return loss - of_base


def _write(found: list[dict]) -> None:
    total, share = (
        experiment_runs.figures_by(found, "optimizer_state_bytes", "optimizer"),
        experiment_runs.figures_by(found, "bytes_a_parameter", "optimizer"),
    )
    rows = [
        [
            kind,
            len(loss),
            f"{grid.OPTIMIZERS[kind][0]:g}",
            f"{total[kind][0]:,}",
            f"{share[kind][0]:.2f}",
            f"{loss.mean():.4f}",
            experiment_record.interval(_gaps(found, kind)) if kind != BASE else "",
        ]
        for kind, loss in experiment_runs.figures_by(found, "loss", "optimizer").items()
    ]
    header = ["optimizer", "seeds", "rate", "bytes of state", "bytes a parameter", "loss"]
    experiment_record.write_table(
        HERE / "README.md", "states", [*header, "minus AdamW's loss"], rows
    )
    experiment_record.write_text(HERE / "README.md", "verdict", _verdict(found))


def _verdict(found: list[dict]) -> str:
    sentences, share = [], experiment_runs.figures_by(found, "bytes_a_parameter", "optimizer")
    for kind in (name for name in share if name != BASE):
        gaps, part = _gaps(found, kind), share[kind][0] / share[BASE][0]
        word = f"{gaps.mean():+.4f} nats on {len(gaps)} seed(s)"
        if len(gaps) > 1:
            interval = statistics.over_seeds(gaps)
            lower = "lower" if interval.mean < 0 else "higher"
            word = f"{lower} loss" if interval.excludes_zero else "no difference in loss"
        sentences.append(f"{kind} {word} with {100 * part:.0f}% of AdamW's state")
    return f"{experiment_record.effort(found)} **Verdict.** {'; '.join(sentences)}."


def _draw(found: list[dict]) -> None:
    share = experiment_runs.figures_by(found, "bytes_a_parameter", "optimizer")
    with experiment_record.panels(HERE / "figures/states.png", size=(6, 4)) as panel:
        for index, (kind, loss) in enumerate(
            experiment_runs.figures_by(found, "loss", "optimizer").items()
        ):
            panel.plot(share[kind], loss, "o", ms=4, color=f"C{index}", label=kind)
        panel.set(xlabel="bytes of optimizer state a parameter")
        panel.set(ylabel="validation loss, nats per token")
        panel.set_xlim(left=0)
        panel.legend(frameon=False, fontsize=8)


if __name__ == "__main__":
    main()
