"""Loss by number format: trains what is missing, then writes tables, figure and verdict.

    python experiments/fp4_training/run.py --seeds=3 --parallel=1

Finished runs in --runs are kept; every beginning of the runs is a result: all recipes, then the next
seed. --write_only trains nothing.
"""

import functools
import pathlib

import grid
import numpy as np

from effarch import experiment_record, experiment_runs
from effarch.scaling import statistics
from effarch.training import writers

HERE = pathlib.Path(__file__).resolve().parent
EXPECTED = (("none", "mxfp8"), ("mxfp8", "nvfp4"), ("quartet", "mxfp4"), ("nvfp4", "mxfp4"))
"""(lower, higher) loss, as the specification's sources find it."""


def main() -> None:
    options = experiment_runs.parser(__doc__, runs="runs/fp4_training", seeds=3).parse_args()
    cells = experiment_runs.over_seeds([{"recipe": x} for x in grid.RECIPES], options.seeds)
    training = functools.partial(experiment_runs.flags, HERE / "grid.py")
    found = [
        cell | _figures(folder, summary)
        for cell, folder, summary in experiment_runs.finished(cells, training, options)
    ]
    if any(run["recipe"] == "none" for run in found):
        experiment_record.write_json(HERE / "results/runs.json", {"runs": found})
        _write(found)
        _draw(found)


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


def _gaps(found: list[dict], recipe: str, base: str = "none") -> np.ndarray:
    """Loss minus that of `base` on the seeds that both have."""
    loss, of_base = experiment_runs.paired(found, "loss", {"recipe": recipe}, {"recipe": base})
    return loss - of_base


def _write(found: list[dict]) -> None:
    rows = []
    for recipe in grid.RECIPES:
        loss, seconds, *errors = (
            experiment_runs.figures(found, name, recipe=recipe)
            for name in ("loss", "seconds", "x_error", "e_error", "cosine")
        )
        if len(loss):
            means = [f"{values.mean():.3f}" if len(values) else "" for values in errors]
            gap = experiment_record.interval(_gaps(found, recipe)) if recipe != "none" else ""
            cells = [f"{loss.mean():.4f}", gap, *means, f"{seconds.mean():.0f}"]
            rows.append([recipe, len(loss), *cells])
    header = ["recipe", "seeds", "loss", "minus none"]
    header += ["error of x", "error of e", "cosine", "s a run"]
    experiment_record.write_table(HERE / "README.md", "losses", header, rows)
    experiment_record.write_text(HERE / "README.md", "verdict", _verdict(found))


def _verdict(found: list[dict]) -> str:
    sentences = []
    for low, high in EXPECTED:
        gaps = _gaps(found, high, low)
        if not len(gaps):
            continue
        if len(gaps) < 2:
            word = "as expected" if gaps.mean() > 0 else "not as expected"
            sentences.append(f"{low} below {high}: {word} on one seed ({gaps.mean():+.4f} nats)")
            continue
        interval = statistics.over_seeds(gaps)
        word = "not told apart" if not interval.excludes_zero else None
        word = word or ("as expected" if interval.mean > 0 else "the other way round")
        sentences.append(f"{low} below {high}: {word} ({experiment_record.interval(gaps)} nats)")
    return f"{experiment_record.effort(found)} **Verdict.** {'; '.join(sentences)}."


def _draw(found: list[dict]) -> None:
    tokens_a_step = found[0]["tokens"] / found[0]["steps"]
    curves = {
        recipe: np.mean(experiment_runs.figures(found, "curve", recipe=recipe), axis=0).T
        for recipe in grid.RECIPES
        if any(run["recipe"] == recipe for run in found)
    }
    path = HERE / "figures/losses.png"
    with experiment_record.panels(path, 2, size=(10, 3.8)) as (left, right):
        for index, (recipe, (steps, loss)) in enumerate(curves.items()):
            left.plot(steps * tokens_a_step, loss, color=f"C{index}", label=recipe)
            if recipe != "none":
                gap = loss - curves["none"][1]
                right.plot(steps * tokens_a_step, gap, color=f"C{index}", label=recipe)
        left.set(xlabel="tokens", ylabel="validation loss, nats per token", yscale="log")
        right.set(xlabel="tokens", ylabel="loss minus that without rounding, nats")
        right.axhline(0, color="0.6", lw=0.8)
        left.legend(frameon=False, fontsize=8)


if __name__ == "__main__":
    main()
