"""Loss of latent experts against plain ones at equal FLOPs and at equal parameters.

    python experiments/latent_experts/run.py --seeds=2

Trains what is missing in --runs, then writes results/runs.json, figures/loss.png and the tables of
README.md; --write_only trains nothing.
"""

import json
import pathlib

import grid
import matplotlib
import matplotlib.pyplot as plt
import numpy as np

from effarch import experiment_record, experiment_runs
from effarch.scaling import statistics

HERE = pathlib.Path(__file__).resolve().parent
BASE = "standard"
NEAR = 0.02
"""How much more loss still counts as near."""
FIGURES = ("val/loss", "params_non_embedding", "flops_active_no_head", "tokens", "seconds")


def main() -> None:
    flags = experiment_runs.parser(__doc__, runs="runs/latent_experts", seeds=2)
    options = flags.parse_args()
    runs = {
        options.runs / f"{kind}-{equal}-seed{seed}": (kind, equal, seed)
        for seed in range(options.seeds)
        for equal in grid.EQUAL
        for kind in grid.KINDS
        if (kind, equal) != (BASE, "params")  # the plain layer is the measure of both
    }
    summaries = experiment_runs.collect(
        {folder: _flags(*cell) for folder, cell in runs.items()}, options
    )
    found = [
        dict(zip(("kind", "equal", "seed"), runs[folder])) | _figures(folder, summary)
        for folder, summary in summaries.items()
    ]
    if found:
        experiment_record.write_json(HERE / "results/runs.json", {"runs": found})
        _write(found)
        _draw(found)


def _flags(kind: str, equal: str, seed: int) -> list[str]:
    return [f"--config={HERE / 'grid.py'}:kind={kind},equal={equal}", f"--config.seed={seed}"]


def _figures(folder: pathlib.Path, summary: dict) -> dict:
    """Of the summary and, over the last lines of metrics, the groups that a token touches."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    last = [json.loads(line) for line in lines if '"train"' in line][-10:]
    measured = {
        name: float(np.mean([line[name] for line in last]))
        for name in ("metric/latent_groups", "metric/max_vio_window")
        if name in last[0]
    }
    return {name: summary[name] for name in FIGURES if name in summary} | measured


def _of(found: list[dict], kind: str, equal: str, name: str = "val/loss") -> np.ndarray:
    equal = "flops" if kind == BASE else equal
    runs = [run for run in found if (run["kind"], run["equal"]) == (kind, equal)]
    return np.array([run[name] for run in sorted(runs, key=lambda run: run["seed"]) if name in run])


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
    minutes = sum(run["seconds"] for run in found) / 60
    start = f"{found[0]['tokens']:,} tokens a run, {len(found)} runs, {minutes:.0f} min in all. "
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
    matplotlib.use("Agg")
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained", sharey=True)
    for panel, equal in zip(axes, grid.EQUAL):
        for number, kind in enumerate(grid.KINDS):
            loss = _of(found, kind, equal)
            panel.plot([number] * len(loss), loss, "o", color=f"C{number}", alpha=0.6)
        panel.set_xticks(range(len(grid.KINDS)), grid.KINDS, rotation=20)
        panel.set(title=f"equal {equal}")
    axes[0].set_ylabel("validation loss, nats per byte")
    (HERE / "figures").mkdir(exist_ok=True)
    figure.savefig(HERE / "figures/loss.png", dpi=120)


if __name__ == "__main__":
    main()
