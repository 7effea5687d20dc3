"""A trained mixture of experts becomes MoLE and is tuned for 2 % of its tokens: before, after, by fit.

    python experiments/moe_conversion/run.py --seeds=3

Trains what is missing in --runs, converts it in every way, scores that, tunes it, then writes
results/runs.json, figures/gap.png and the tables of README.md; --write_only trains nothing.
"""

import json
import pathlib
import shutil

import grid
import numpy as np

from effarch import experiment_record, experiment_runs
from effarch.convert.moe_to_latent import layers, runs
from effarch.training import evaluation, restore

HERE = pathlib.Path(__file__).resolve().parent
RANKS = (grid.EXPERT // 2, grid.EXPERT)
FITS = {"weights": 0, "outputs": 65536}
"""What the fit keeps -> tokens of calibration."""
TUNED = 0.02
"""Tokens of tuning as a share of those of training."""
SMALL = 0.005
"""Nats below which a gap is none."""


def main() -> None:
    options = experiment_runs.parser(__doc__, runs="runs/moe_conversion", seeds=3).parse_args()
    sources = {options.runs / f"standard-seed{seed}": seed for seed in range(options.seeds)}
    config = f"--config={HERE / 'grid.py'}"
    trained = experiment_runs.collect(
        {folder: [config, f"--config.seed={seed}"] for folder, seed in sources.items()}, options
    )
    cells = {
        options.runs / f"rank{rank}-{fit}-seed{sources[folder]}": (folder, rank, fit)
        for folder in trained
        for rank in RANKS
        for fit in FITS
    }
    if not options.write_only:
        for folder, (source, rank, fit) in cells.items():
            _convert(source, folder, rank, fit, trained[source]["steps"])
    options.steps = 0
    known = {folder: cell for folder, cell in cells.items() if (folder / "before.json").exists()}
    tuned = experiment_runs.collect(
        {folder: [f"--config={folder / 'config.json'}"] for folder in known}, options
    )
    found = [
        _figures(folder, known[folder], summary, trained[known[folder][0]])
        | {"seed": sources[known[folder][0]]}
        for folder, summary in tuned.items()
    ]
    if found:
        experiment_record.write_json(HERE / "results/runs.json", {"runs": found})
        _write(found)
        _draw(found)


def _convert(source: pathlib.Path, folder: pathlib.Path, rank: int, fit: str, steps: int) -> None:
    """Makes the run and scores it untuned; before.json is written last, so an old attempt is known."""
    if (folder / "before.json").exists():
        return
    shutil.rmtree(folder, ignore_errors=True)
    base = grid.get_config()
    base.seed = json.loads((source / "config.json").read_text())["config"]["seed"]
    base.train.num_steps = max(round(TUNED * steps), 1)
    base.optimizer.learning_rate /= 10
    base.optimizer.schedule.warmup_steps = base.train.num_steps // 10
    options = layers.Options(group_size=8, latent=rank, calibrate=FITS[fit])
    _, rows = runs.convert_run(source, folder, options, base=base)
    plan, state = restore.open_run(folder)
    windows = evaluation.batches(plan)
    scored = evaluation.evaluate(plan, plan.eval_step(), state.params, state.model_state, windows)
    lost = {key: float(np.mean([row[key] for row in rows])) for key in rows[0] if "lost" in key}
    (folder / "before.json").write_text(json.dumps({"loss": scored["loss"]} | lost))


def _figures(folder: pathlib.Path, cell: tuple, summary: dict, trained: dict) -> dict:
    before = json.loads((folder / "before.json").read_text())
    return {
        "rank": cell[1],
        "fit": cell[2],
        "weights_lost": before["weights_lost"],
        "standard": trained["val/loss"],
        "before": before["loss"],
        "after": summary["val/loss"],
        "params_total": summary["params_total"],
        "params_standard": trained["params_total"],
        "tokens": trained["tokens"],
        "seconds": summary["seconds"] + trained["seconds"] / len(RANKS) / len(FITS),
    }


def _of(found: list[dict], rank: int, fit: str, name: str) -> np.ndarray:
    return experiment_runs.figures(found, name, rank=rank, fit=fit)


def _write(found: list[dict]) -> None:
    rows = []
    for rank in RANKS:
        for fit in FITS:
            if not len(_of(found, rank, fit, "after")):
                continue
            mean = {name: _of(found, rank, fit, name).mean() for name in found[0] if name != "fit"}
            gaps = [mean[name] - mean["standard"] for name in ("before", "after")]
            rows.append(
                [
                    rank,
                    fit,
                    f"{mean['params_total'] / mean['params_standard'] - 1:+.1%}",
                    f"{mean['weights_lost']:.1%}",
                    f"{mean['standard']:.4f}",
                    f"{mean['before']:.4f}",
                    f"{mean['after']:.4f}",
                    f"{1 - gaps[1] / gaps[0]:.0%}" if gaps[0] > SMALL else "",
                    len(_of(found, rank, fit, "after")),
                ]
            )
    header = ["rank", "fit to", "parameters", "weights lost", "loss of the standard model"]
    header += ["converted", "tuned", "gap closed", "seeds"]
    experiment_record.write_table(HERE / "README.md", "runs", header, rows)
    experiment_record.write_text(HERE / "README.md", "verdict", _verdict(found))


def _verdict(found: list[dict]) -> str:
    minutes = sum(run["seconds"] for run in found) / 60
    start = f"{found[0]['tokens']:,} tokens of training, {minutes:.0f} min in all. "
    whole = {rank: all(len(_of(found, rank, fit, "after")) >= 2 for fit in FITS) for rank in RANKS}
    if not all(whole.values()):
        return start + "No verdict yet: two seeds of every conversion are needed."
    sentences = ["**Verdict.**"]
    for rank in RANKS:
        plain, fitted = (_of(found, rank, fit, "before") for fit in FITS)
        claim = f"At rank {rank} a fit to outputs loses less than one to weights"
        told = "{:+.4f} nats before tuning"
        sentences.append(experiment_record.claim(claim, fitted - plain, told))
        before, after = (
            (_of(found, rank, "outputs", name) - _of(found, rank, "outputs", "standard")).mean()
            for name in ("before", "after")
        )
        halves = "holds" if after <= before / 2 else "fails"
        if before < SMALL:
            halves = "says nothing, for there is next to none,"
        sentences.append(
            f"*Tuning with {TUNED:.0%} of the tokens halves the gap* {halves} there (means of the fit "
            f"to outputs: {before:+.4f}, then {after:+.4f})."
        )
    return start + " ".join(sentences)


def _draw(found: list[dict]) -> None:
    with experiment_record.panels(HERE / "figures/gap.png", size=(6, 3.6)) as panel:
        for number, (rank, fit) in enumerate((rank, fit) for rank in RANKS for fit in FITS):
            gaps = [_of(found, rank, fit, name) for name in ("before", "after")]
            if not len(gaps[0]):
                continue
            gaps = [values - _of(found, rank, fit, "standard") for values in gaps]
            style = dict(marker="o", ms=4, color=f"C{number}")
            panel.plot([0, 1], gaps, label=None, **style)
            panel.plot([], [], label=f"rank {rank}, fit to {fit}", **style)
        panel.axhline(0, color="0.6", lw=1)
        panel.set(xticks=[0, 1], xticklabels=["converted", f"tuned, {TUNED:.0%} of tokens"])
        panel.set(ylabel="validation loss above the standard model, nats", xlim=(-0.2, 1.2))
        panel.legend(frameon=False, fontsize=8)


if __name__ == "__main__":
    main()
