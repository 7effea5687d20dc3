"""Trains factored feed-forwards beside the dense one: python experiments/structured_ffn/run.py

Trains what is missing in the folder of runs, one after the other, then writes results/runs.json,
figures/loss.png and the tables of README.md. 45 minutes on one core; `--steps` makes it shorter.
"""

import pathlib

import matplotlib
import matplotlib.pyplot as plt
import numpy as np

from effarch import experiment_record, experiment_runs
from effarch.scaling import statistics

HERE = pathlib.Path(__file__).resolve().parent
STEPS = 200
WIDTH, HIDDEN, DEPTH = 128, 768, 4
DENSE = 2 * WIDTH * HIDDEN * DEPTH
"""Parameters of the dense feed-forwards of all layers."""
VARIANTS = {  # form, options, whether self-guided
    "dense": ("mlp", {}, False),
    "low rank 29 %": ("low_rank", dict(rank=32), False),
    "low rank 29 %, guided": ("low_rank", dict(rank=32), True),
    "block dense 29 %": ("block_dense", dict(rank=44, blocks=2), False),
    "block shuffle 29 %": ("block_shuffle", dict(blocks=4), False),
    "SLTrain, rank 32 and 3 %": ("sltrain", dict(rank=32), False),
}
FIGURES = ("val/loss", "params_total", "tokens", "flops_forward_no_head", "flops_model")


def main() -> None:
    flags = experiment_runs.parser(__doc__, runs="runs/structured_ffn", seeds=3)
    flags.set_defaults(steps=STEPS)
    options = flags.parse_args()
    runs = {
        options.runs / f"{_slug(name)}-seed{seed}": (name, _flags(name, seed, options.steps))
        for seed in range(options.seeds)
        for name in VARIANTS
    }
    summaries = experiment_runs.collect({folder: x for folder, (_, x) in runs.items()}, options)
    found: dict[str, list] = {name: [] for name in VARIANTS}
    for folder, summary in summaries.items():
        name = runs[folder][0]
        found[name].append(_figures(name, summary))
    found = {name: rows for name, rows in found.items() if rows}
    experiment_record.write_json(HERE / "results/runs.json", found)
    _write_runs(found)
    _write_verdict(found)
    _draw(found)


def _slug(name: str) -> str:
    return name.replace(" %", "").replace(",", "").replace(" ", "-")


def _flags(name: str, seed: int, steps: int) -> list[str]:
    form, options, is_guided = VARIANTS[name]
    guided = steps // 2 if is_guided else 0
    flags = [f"--config=sparse:ffn={form},guided={guided}", f"--config.seed={seed}"]
    flags += [f"--config.optimizer.schedule.warmup_steps={min(50, steps // 4)}"]
    section = "mlp" if form == "mlp" else "structured_mlp"
    options = options | {"hidden": HIDDEN}
    return flags + [f"--config.model.blocks.{section}.{k}={v}" for k, v in options.items()]


def _figures(name: str, summary: dict) -> dict:
    """Parameters without guides, and training FLOPs with them.

    A guide runs in half of the steps of the first half of training: a quarter of the dense FLOPs.
    """
    found = {figure: summary[figure] for figure in FIGURES}
    if VARIANTS[name][2]:
        found["params_total"] -= DENSE
        found["flops_model"] += 0.25 * 6 * DENSE * found["tokens"]
    return found


def _losses(found: dict, name: str) -> np.ndarray:
    return np.array([run["val/loss"] for run in found[name]])


def _write_runs(found: dict) -> None:
    rows = []
    for name, runs in found.items():
        loss = statistics.over_seeds(_losses(found, name))
        rows.append(
            [
                name,
                f"{runs[0]['params_total'] / 1e6:.2f} M",
                f"{runs[0]['flops_forward_no_head'] / 1e6:.2f} M",
                f"{runs[0]['flops_model']:.2e}",
                f"{loss.mean:.4f}",
                f"{loss.low:.4f} to {loss.high:.4f}",
            ]
        )
    header = ["feed-forward", "parameters", "forward FLOPs a token, without head"]
    header += ["FLOPs of training", "validation loss, nats", "95 % over seeds"]
    experiment_record.write_table(HERE / "README.md", "runs", header, rows)


def _write_verdict(found: dict) -> None:
    """Differences are of runs with the same seed."""
    sentences = []
    for first, second, claim in (
        ("low rank 29 %, guided", "low rank 29 %", "guided low rank below plain low rank"),
        ("SLTrain, rank 32 and 3 %", "low rank 29 %", "SLTrain below low rank at equal rank"),
        ("low rank 29 %", "block shuffle 29 %", "low rank below block shuffle on text"),
    ):
        if first not in found or second not in found:
            continue
        pairs = min(len(found[first]), len(found[second]))
        ratio = _losses(found, first)[:pairs] / _losses(found, second)[:pairs] - 1
        interval = statistics.over_seeds(ratio)
        verdict = (
            "holds"
            if interval.high < 0
            else "fails"
            if interval.low > 0
            else "is not decided by these seeds"
        )
        sentences.append(
            f"*{claim}* {verdict} (loss {interval.mean:+.2%}, 95 % interval {interval.low:+.2%} to "
            f"{interval.high:+.2%})."
        )
    experiment_record.write_text(HERE / "README.md", "verdict", " ".join(sentences))


def _draw(found: dict) -> None:
    matplotlib.use("Agg")
    figure, panels = plt.subplots(1, 2, figsize=(9, 4), layout="constrained", sharey=True)
    for name, runs in found.items():
        loss = _losses(found, name)
        ends = [[loss.mean() - loss.min()], [loss.max() - loss.mean()]]
        for axis, key in zip(panels, ("params_total", "flops_model")):
            axis.errorbar(runs[0][key], loss.mean(), yerr=ends, fmt="o", capsize=3, label=name)
    panels[0].set(xlabel="parameters", ylabel="validation loss, nats")
    panels[1].set(xlabel="FLOPs of training, guides included")
    panels[1].legend(frameon=False, fontsize=7)
    (HERE / "figures").mkdir(exist_ok=True)
    figure.savefig(HERE / "figures/loss.png", dpi=120)


if __name__ == "__main__":
    main()
