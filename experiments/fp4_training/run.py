"""Loss by number format: trains what is missing, then writes tables, figure and verdict.

    python experiments/fp4_training/run.py --seeds=3 --parallel=1

Finished runs in --runs are kept; every beginning of the runs is a result: all recipes, then the next
seed. --write_only trains nothing.
"""

import pathlib

import grid
import matplotlib
import matplotlib.pyplot as plt
import numpy as np

from effarch import experiment_record, experiment_runs
from effarch.scaling import statistics
from effarch.training import writers

HERE = pathlib.Path(__file__).resolve().parent
EXPECTED = (("none", "mxfp8"), ("mxfp8", "nvfp4"), ("quartet", "mxfp4"), ("nvfp4", "mxfp4"))
"""(lower, higher) loss, as the specification's sources find it."""


def main() -> None:
    flags = experiment_runs.parser(__doc__, runs="runs/fp4_training", seeds=3)
    options = flags.parse_args()
    cells = [(recipe, seed) for seed in range(options.seeds) for recipe in grid.RECIPES]
    runs = {options.runs / f"{recipe}-seed{seed}": (recipe, seed) for recipe, seed in cells}
    summaries = experiment_runs.collect(
        {folder: _flags(*cell) for folder, cell in runs.items()}, options
    )
    found = {recipe: [] for recipe in grid.RECIPES}
    for folder, summary in summaries.items():
        recipe, seed = runs[folder]
        found[recipe].append({"seed": seed} | _figures(folder, summary))
    found = {recipe: rows for recipe, rows in found.items() if rows}
    if "none" in found:
        experiment_record.write_json(HERE / "results/runs.json", found)
        _write(found)
        _draw(found)


def _flags(recipe: str, seed: int) -> list[str]:
    return [f"--config={HERE / 'grid.py'}:recipe={recipe}", f"--config.seed={seed}"]


def _figures(folder: pathlib.Path, summary: dict) -> dict:
    curve = [[r["step"], r["loss"]] for r in writers.read_metrics(folder, "eval")]
    looks = writers.read_metrics(folder, "rounding")
    last = looks[-1] if looks else {}
    means = {
        name: float(np.mean([v for path, v in last.items() if path.endswith(f"/{name}")]))
        for name in ("x_error", "e_error", "cosine")
        if last
    }
    names = ("params_total", "tokens", "steps", "seconds")
    own = {name: summary[name] for name in names}
    return {"loss": summary["val/loss"], **own, **means, "curve": curve}


def _gaps(found: dict, recipe: str, base: str = "none") -> np.ndarray:
    """Loss minus that of `base` on the seeds that both have."""
    losses = [{row["seed"]: row["loss"] for row in found[name]} for name in (recipe, base)]
    return np.array([losses[0][seed] - losses[1][seed] for seed in losses[0] if seed in losses[1]])


def _interval(values: np.ndarray) -> str:
    if len(values) < 2:
        return f"{values.mean():+.4f}" if len(values) else ""
    found = statistics.over_seeds(values)
    return f"{found.mean:+.4f} ({found.low:+.4f} to {found.high:+.4f})"


def _write(found: dict) -> None:
    rows = []
    for recipe, runs in found.items():
        means = [
            f"{np.mean([run[name] for run in runs]):.3f}" if name in runs[0] else ""
            for name in ("x_error", "e_error", "cosine")
        ]
        loss = f"{np.mean([run['loss'] for run in runs]):.4f}"
        gap = _interval(_gaps(found, recipe)) if recipe != "none" else ""
        seconds = f"{np.mean([run['seconds'] for run in runs]):.0f}"
        rows.append([recipe, len(runs), loss, gap, *means, seconds])
    header = [
        "recipe",
        "seeds",
        "loss",
        "minus none",
        "error of x",
        "error of e",
        "cosine",
        "s a run",
    ]
    experiment_record.write_table(HERE / "README.md", "losses", header, rows)
    experiment_record.write_text(HERE / "README.md", "verdict", _verdict(found))


def _verdict(found: dict) -> str:
    sentences = []
    for low, high in EXPECTED:
        if low not in found or high not in found:
            continue
        gaps = _gaps(found, high, low)
        if len(gaps) < 2:
            word = "as expected" if gaps.mean() > 0 else "not as expected"
            sentences.append(f"{low} below {high}: {word} on one seed ({gaps.mean():+.4f} nats)")
            continue
        interval = statistics.over_seeds(gaps)
        word = "not told apart" if not interval.excludes_zero else None
        word = word or ("as expected" if interval.mean > 0 else "the other way round")
        sentences.append(f"{low} below {high}: {word} ({_interval(gaps)} nats)")
    minutes = sum(run["seconds"] for runs in found.values() for run in runs) / 60
    count = sum(map(len, found.values()))
    return f"{count} runs, {minutes:.0f} min in all. **Verdict.** {'; '.join(sentences)}."


def _draw(found: dict) -> None:
    matplotlib.use("Agg")
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    base = _mean_curve(found["none"])
    for index, (recipe, runs) in enumerate(found.items()):
        steps, loss = _mean_curve(runs)
        tokens = steps * runs[0]["tokens"] / runs[0]["steps"]
        left.plot(tokens, loss, color=f"C{index}", label=recipe)
        if recipe != "none" and len(loss) == len(base[1]):
            right.plot(tokens, loss - base[1], color=f"C{index}", label=recipe)
    left.set(xlabel="tokens", ylabel="validation loss, nats per token", yscale="log")
    right.set(xlabel="tokens", ylabel="loss minus that without rounding, nats")
    right.axhline(0, color="0.6", lw=0.8)
    left.legend(frameon=False, fontsize=8)
    (HERE / "figures").mkdir(exist_ok=True)
    figure.savefig(HERE / "figures/losses.png", dpi=120)
    plt.close(figure)


def _mean_curve(runs: list[dict]) -> tuple[np.ndarray, np.ndarray]:
    curves = np.array([run["curve"] for run in runs])
    return curves[0, :, 0], curves[:, :, 1].mean(0)


if __name__ == "__main__":
    main()
