"""Loss of latent experts against plain ones at equal FLOPs and at equal parameters.

    python experiments/latent_experts/run.py --seeds=2

Trains what is missing in --runs, then writes results/runs.json, figures/loss.png and the tables of
README.md; --write_only trains nothing.
"""

import functools
import pathlib

import grid
import numpy as np

from effarch import experiment_record, experiment_runs
from effarch.scaling import statistics

HERE = pathlib.Path(__file__).resolve().parent
BASE = "standard"
NEAR = 0.02
"""How much more loss still counts as near."""
FIGURES = ("val/loss", "params_non_embedding", "flops_active_no_head", "tokens", "seconds")


def main() -> None:
    options = experiment_runs.parser(__doc__, runs="runs/latent_experts", seeds=2).parse_args()
    rows = [
        {"kind": kind, "equal": equal}
        for equal in grid.EQUAL
        for kind in grid.KINDS
        if (kind, equal) != (BASE, "params")  # the plain layer is the measure of both
    ]
    cells = experiment_runs.over_seeds(rows, options.seeds)
    training = functools.partial(experiment_runs.flags, HERE / "grid.py")
    found = [
        cell | _figures(folder, summary)
        for cell, folder, summary in experiment_runs.finished(cells, training, options)
    ]
    if found:
        experiment_record.write_json(HERE / "results/runs.json", {"runs": found})
        _write(found)
        _draw(found)


def _figures(folder: pathlib.Path, summary: dict) -> dict:
    """Of the summary and, over the last lines of metrics, the groups that a token touches."""
    names = ("metric/latent_groups", "metric/max_vio_window")
    figures = {name: summary[name] for name in FIGURES if name in summary}
    return figures | experiment_runs.last_means(folder, names)


def _of(found: list[dict], kind: str, equal: str, name: str = "val/loss") -> np.ndarray:
    equal = "flops" if kind == BASE else equal
    return experiment_runs.figures(found, name, kind=kind, equal=equal)


def _write(found: list[dict]) -> None:
    for equal in grid.EQUAL:
        rows = []
        for kind in grid.KINDS:
            loss = _of(found, kind, equal)
            if not len(loss):
                continue
            groups = _of(found, kind, equal, "metric/latent_groups")
            rows.append(
                [
                    kind,
                    f"{_of(found, kind, equal, 'params_non_embedding').mean() / 1e6:.3f} M",
                    f"{_of(found, kind, equal, 'flops_active_no_head').mean() / 1e6:.3f} M",
                    f"{groups.mean():.2f}" if len(groups) else "",
                    f"{loss.mean():.4f}",
                    f"{loss.min():.4f} to {loss.max():.4f}",
                ]
            )
        header = ["experts", "parameters", "forward FLOPs a token", "groups a token"]
        header += ["validation loss, nats", f"{len(_of(found, BASE, equal))} seeds"]
        experiment_record.write_table(HERE / "README.md", equal, header, rows)
    experiment_record.write_text(HERE / "README.md", "verdict", _verdict(found))


def _verdict(found: list[dict]) -> str:
    start = f"{found[0]['tokens']:,} tokens a run, {experiment_record.effort(found)} "
    cells = [(kind, equal) for equal in grid.EQUAL for kind in grid.KINDS]
    if min(len(_of(found, *cell)) for cell in cells) < 2:
        return start + "No verdict yet: two seeds of every cell are needed."
    sentences = ["**Verdict.**"]
    for equal, word in (("flops", "FLOPs"), ("params", "parameters")):
        base = _of(found, BASE, equal)
        parts = []
        for kind in grid.KINDS[1:]:
            seeds = min(len(base), len(_of(found, kind, equal)))
            ratio = statistics.over_seeds(_of(found, kind, equal)[:seeds] / base[:seeds] - 1)
            near = (
                "near"
                if ratio.high < NEAR
                else "not near"
                if ratio.low > NEAR
                else "not decided by these seeds"
            )
            parts.append(
                f"{kind} {ratio.mean:+.2%} ({ratio.low:+.2%} to {ratio.high:+.2%}; {near})"
            )
        sentences.append(f"Loss against plain experts at equal {word}: {', '.join(parts)}.")
    return start + " ".join(sentences)


def _draw(found: list[dict]) -> None:
    path = HERE / "figures/loss.png"
    with experiment_record.panels(path, 2, size=(9, 3.6), sharey=True) as panels:
        for panel, equal in zip(panels, grid.EQUAL):
            for number, kind in enumerate(grid.KINDS):
                loss = _of(found, kind, equal)
                panel.plot([number] * len(loss), loss, "o", color=f"C{number}", alpha=0.6)
            panel.set_xticks(range(len(grid.KINDS)), grid.KINDS, rotation=20)
            panel.set(title=f"equal {equal}")
        panels[0].set_ylabel("validation loss, nats per byte")


if __name__ == "__main__":
    main()
