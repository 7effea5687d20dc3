"""Load and loss under six ways of balancing experts.

    python experiments/router_balance/run.py --seeds=3

Trains what is missing in --runs, then writes results/runs.json, figures/load.png and the tables of
README.md; --write_only trains nothing.
"""

import functools
import json
import pathlib

import grid
import numpy as np

from effarch import experiment_record, experiment_runs
from effarch.scaling import statistics
from effarch.training import report_runs

HERE = pathlib.Path(__file__).resolve().parent
CELLS = [(top_k, balance) for top_k, balances in grid.BALANCES.items() for balance in balances]
EVEN = 0.5
"""MaxVio over the window below which a layer counts as balanced."""


def main() -> None:
    options = experiment_runs.parser(__doc__, runs="runs/router_balance", seeds=3).parse_args()
    rows = [{"top_k": top_k, "balance": balance} for top_k, balance in CELLS]
    cells = experiment_runs.over_seeds(rows, options.seeds)
    switches = {"steps": options.steps} if options.steps else {}
    options.steps = 0  # a schedule's steps are those of the run
    training = functools.partial(experiment_runs.flags, HERE / "grid.py", **switches)
    found = [
        cell | _figures(folder, summary)
        for cell, folder, summary in experiment_runs.finished(cells, training, options)
    ]
    if found:
        experiment_record.write_json(HERE / "results/runs.json", {"runs": found})
        _write(found)
        _draw(found)


def _figures(folder: pathlib.Path, summary: dict) -> dict:
    """Loss and, of each layer, the excess of its most used expert and its least used one's load."""
    loads = json.loads((folder / report_runs.LOAD).read_text())
    shares = [np.array(loads[layer]) for layer in sorted(loads, key=int)]
    return {
        "loss": summary["val/loss"],
        "max_vio": [float(share.max() * len(share) - 1) for share in shares],
        "min_load": [float(share.min() * len(share)) for share in shares],
        "tokens": summary["tokens"],
        "seconds": summary["seconds"],
    }


def _of(found: list[dict], top_k: int, balance: str, name: str) -> np.ndarray:
    return experiment_runs.figures(found, name, top_k=top_k, balance=balance)


def _write(found: list[dict]) -> None:
    rows = []
    for cell in CELLS:
        loss = _of(found, *cell, "loss")
        if not len(loss):
            continue
        vio, least = (_of(found, *cell, name) for name in ("max_vio", "min_load"))
        rows.append(
            [
                *cell,
                f"{vio[:, 0].mean():.2f}",
                f"{vio[:, 0].min():.2f} to {vio[:, 0].max():.2f}",
                f"{vio[:, 1:].mean():.2f}",
                f"{least[:, 0].mean():.2f}",
                f"{loss.mean():.4f}",
                len(loss),
            ]
        )
    header = ["experts a token", "balance", "MaxVio, layer 0", "range", "MaxVio, other layers"]
    header += ["least load, layer 0", "validation loss, nats", "seeds"]
    experiment_record.write_table(HERE / "README.md", "runs", header, rows)
    experiment_record.write_text(HERE / "README.md", "verdict", _verdict(found))


def _verdict(found: list[dict]) -> str:
    start = f"{found[0]['tokens']:,} tokens a run, {experiment_record.effort(found)} "
    if min(len(_of(found, *cell, "loss")) for cell in CELLS) < 2:
        return start + "No verdict yet: two seeds of every cell are needed."
    loss = {cell: _of(found, *cell, "loss") for cell in CELLS}
    vio = {cell: _of(found, *cell, "max_vio")[:, 0] for cell in CELLS}
    bias = _of(found, 4, "bias", "max_vio").max()
    difference = statistics.over_seeds(loss[4, "bias"] - loss[4, "loss"])
    order = ("bias", "schedule", "top1")
    ranked = all((vio[1, a] > vio[1, b]).all() for a, b in zip(order, order[1:]))
    means = ", ".join(f"{balance} {vio[1, balance].mean():.2f}" for balance in order)
    return start + (
        "**Verdict.** With 4 experts a token *the bias balances (MaxVio below "
        f"{EVEN} in every layer) at no more loss than the balance loss* {_judged(bias, difference)} "
        f"(largest MaxVio {bias:.2f}; loss {difference.mean:+.4f}, 95 % interval "
        f"{difference.low:+.4f} to {difference.high:+.4f}). With 1 *the first layer's MaxVio falls from "
        f"the bias over the schedule to the Top-1 loss* "
        f"{'holds on every seed' if ranked else 'does not hold'} ({means}; the plain balance loss "
        f"{vio[1, 'loss'].mean():.2f})."
    )


def _judged(max_vio: float, difference: statistics.Interval) -> str:
    return "fails" if max_vio >= EVEN else experiment_record.judged(difference)


def _draw(found: list[dict]) -> None:
    labels = [f"{balance}, {top_k}" for top_k, balance in CELLS]
    with experiment_record.panels(HERE / "figures/load.png", 2, size=(9, 3.6)) as panels:
        for number, cell in enumerate(CELLS):
            vio, loss = _of(found, *cell, "max_vio"), _of(found, *cell, "loss")
            if len(loss):
                panels[0].plot([number] * len(vio), vio[:, 0], "o", color=f"C{number}", alpha=0.6)
                panels[1].plot([number] * len(loss), loss, "o", color=f"C{number}", alpha=0.6)
        names = ("MaxVio of layer 0 over the last 100 steps", "validation loss, nats per byte")
        for panel, name in zip(panels, names):
            panel.set_xticks(range(len(CELLS)), labels, rotation=25)
            panel.set(ylabel=name)


if __name__ == "__main__":
    main()
