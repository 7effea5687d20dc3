"""Trains sparse feed-forwards and their dense baseline: python experiments/spark_ffn/run.py

Trains what is missing in the folder of runs, one after the other, then writes results/runs.json,
figures/loss.png and the tables of README.md. An hour on one core; `--steps` makes it shorter.
"""

import json
import pathlib

import matplotlib
import matplotlib.pyplot as plt
import numpy as np

from effarch import experiment_record, experiment_runs
from effarch.scaling import statistics

HERE = pathlib.Path(__file__).resolve().parent
VARIANTS = {
    "dense GeGLU": "ffn=glu",
    "top-k of the gate, 8 %": "ffn=topk",
    "Spark, 8 %": "ffn=spark",
    "Spark, 25 %": "ffn=spark,fraction=0.25",
    "Spark, 8 %, and Spark attention": "ffn=spark,mixer=spark",
}
BASELINE, UNSPLIT, SPARK, _, SPARK_BOTH = VARIANTS
FIGURES = ("val/loss", "params_total", "tokens", "flops_active", "flops_active_no_head")


def main() -> None:
    flags = experiment_runs.parser(__doc__, runs="runs/spark_ffn", seeds=3)
    flags.set_defaults(steps=350)
    options = flags.parse_args()
    runs = {
        options.runs / f"{_slug(switches)}-seed{seed}": (
            name,
            _flags(switches, seed, options.steps),
        )
        for name, switches in VARIANTS.items()
        for seed in range(options.seeds)
    }
    summaries = experiment_runs.collect({folder: x for folder, (_, x) in runs.items()}, options)
    found = {name: [] for name in VARIANTS}
    for folder, summary in summaries.items():
        found[runs[folder][0]].append(_figures(folder, summary))
    experiment_record.write_json(HERE / "results/runs.json", found)
    _write_runs(found)
    _write_verdict(found)
    _draw(found)


def _slug(switches: str) -> str:
    return switches.replace("=", "-").replace(",", "-")


def _flags(switches: str, seed: int, steps: int) -> list[str]:
    flags = [f"--config=sparse:{switches}", f"--config.seed={seed}"]
    return [*flags, f"--config.optimizer.schedule.warmup_steps={min(50, steps // 4)}"]


def _figures(folder: pathlib.Path, summary: dict) -> dict:
    """Loss, sizes and, over the last lines of metrics, the measured activity."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    last = [json.loads(line) for line in lines if '"train"' in line][-10:]
    measured = {
        name: float(np.mean([line[name] for line in last]))
        for name in ("metric/active_fraction", "metric/attended_keys")
        if name in last[0]
    }
    return {name: summary[name] for name in FIGURES} | measured


def _losses(found: dict, name: str) -> np.ndarray:
    return np.array([run["val/loss"] for run in found[name]])


def _write_runs(found: dict) -> None:
    rows = []
    for name, runs in found.items():
        loss = statistics.over_seeds(_losses(found, name))
        active = [run.get("metric/active_fraction", 1.0) for run in runs]
        rows.append(
            [
                name,
                f"{runs[0]['params_total'] / 1e6:.2f} M",
                f"{runs[0]['flops_active'] / 1e6:.2f} M",
                f"{runs[0]['flops_active_no_head'] / 1e6:.2f} M",
                f"{np.mean(active):.1%}",
                f"{loss.mean:.4f}",
                f"{loss.low:.4f} to {loss.high:.4f}",
            ]
        )
    header = ["variant", "parameters", "forward FLOPs in use a token", "without head"]
    header += ["active neurons, measured", "validation loss, nats", "95 % over seeds"]
    experiment_record.write_table(HERE / "README.md", "runs", header, rows)


def _write_verdict(found: dict) -> None:
    """Differences are of runs with the same seed."""
    tokens = found[BASELINE][0]["tokens"]
    sentences = [f"After {tokens:,} tokens and {min(map(len, found.values()))} seeds:"]
    for first, second, claim in (
        (SPARK, BASELINE, "Spark within 2 % of the dense layer"),
        (SPARK, UNSPLIT, "the predictor's split no worse than the same threshold without it"),
        (SPARK_BOTH, SPARK, "Spark attention within 1 % of full attention"),
    ):
        ratio = _losses(found, first) / _losses(found, second) - 1
        interval = statistics.over_seeds(ratio)
        most = {BASELINE: 0.02, UNSPLIT: 0.0, SPARK: 0.01}[second]
        verdict = (
            "holds"
            if interval.high <= most
            else "fails"
            if interval.low > most
            else "is not decided by these seeds"
        )
        sentences.append(
            f"*{claim}* {verdict} (loss {interval.mean:+.2%}, 95 % interval {interval.low:+.2%} to "
            f"{interval.high:+.2%})."
        )
    experiment_record.write_text(HERE / "README.md", "verdict", " ".join(sentences))


def _draw(found: dict) -> None:
    matplotlib.use("Agg")
    figure, axis = plt.subplots(figsize=(6, 4), layout="constrained")
    for name, runs in found.items():
        loss = _losses(found, name)
        flops = runs[0]["flops_active_no_head"]
        axis.errorbar(
            flops,
            loss.mean(),
            yerr=[[loss.mean() - loss.min()], [loss.max() - loss.mean()]],
            fmt="o",
            capsize=3,
            label=name,
        )
    axis.set(
        xlabel="forward FLOPs in use a token, without the head", ylabel="validation loss, nats"
    )
    axis.legend(frameon=False, fontsize=8)
    (HERE / "figures").mkdir(exist_ok=True)
    figure.savefig(HERE / "figures/loss.png", dpi=120)


if __name__ == "__main__":
    main()
