"""Trains sparse feed-forwards and their dense baseline: python experiments/spark_ffn/run.py

Trains what is missing in the folder of runs, one after the other, then writes results/runs.json,
figures/loss.png and the tables of README.md. An hour on one core; `--steps` makes it shorter.
"""

import functools
import pathlib

from effarch import experiment_record, experiment_runs
from effarch.scaling import statistics

HERE = pathlib.Path(__file__).resolve().parent
VARIANTS = {
    "dense GeGLU": {"ffn": "glu"},
    "top-k of the gate, 8 %": {"ffn": "topk"},
    "Spark, 8 %": {"ffn": "spark"},
    "Spark, 25 %": {"ffn": "spark", "fraction": 0.25},
    "Spark, 8 %, and Spark attention": {"ffn": "spark", "mixer": "spark"},
}
BASELINE, UNSPLIT, SPARK, _, SPARK_BOTH = VARIANTS
ACTIVE = "metric/active_fraction"
FIGURES = ("val/loss", "params_total", "tokens", "flops_active", "flops_active_no_head")


def main() -> None:
    flags = experiment_runs.parser(__doc__, runs="runs/spark_ffn", seeds=3)
    flags.set_defaults(steps=350)
    options = flags.parse_args()
    cells = {
        f"{_slug(name)}-seed{seed}": {"variant": name, "seed": seed}
        for name in VARIANTS
        for seed in range(options.seeds)
    }
    training = functools.partial(_flags, steps=options.steps)
    found = [
        cell | _figures(folder, summary)
        for cell, folder, summary in experiment_runs.finished(cells, training, options)
    ]
    if found:
        experiment_record.write_json(HERE / "results/runs.json", {"runs": found})
        _write_runs(found)
        _write_verdict(found)
        _draw(found)


def _slug(variant: str) -> str:
    return "-".join(f"{name}-{value}" for name, value in VARIANTS[variant].items())


def _flags(variant: str, seed: int, steps: int) -> list[str]:
    flags = experiment_runs.flags("sparse", seed, **VARIANTS[variant])
    return [*flags, f"--config.optimizer.schedule.warmup_steps={min(50, steps // 4)}"]


def _figures(folder: pathlib.Path, summary: dict) -> dict:
    """Loss, sizes and, over the last lines of metrics, the measured activity."""
    names = (ACTIVE, "metric/attended_keys")
    sizes = {name: summary[name] for name in FIGURES}
    return sizes | experiment_runs.last_means(folder, names)


def _write_runs(found: list[dict]) -> None:
    rows = []
    params, flops, without_head, active = (
        experiment_runs.figures_by(found, name, "variant")
        for name in ("params_total", "flops_active", "flops_active_no_head", ACTIVE)
    )
    for name, losses in experiment_runs.figures_by(found, "val/loss", "variant").items():
        loss = statistics.over_seeds(losses)
        rows.append(
            [
                name,
                f"{params[name][0] / 1e6:.2f} M",
                f"{flops[name][0] / 1e6:.2f} M",
                f"{without_head[name][0] / 1e6:.2f} M",
                f"{active[name].mean() if len(active[name]) else 1:.1%}",
                f"{loss.mean:.4f}",
                f"{loss.low:.4f} to {loss.high:.4f}",
            ]
        )
    header = ["variant", "parameters", "forward FLOPs in use a token", "without head"]
    header += ["active neurons, measured", "validation loss, nats", "95 % over seeds"]
    experiment_record.write_table(HERE / "README.md", "runs", header, rows)


def _write_verdict(found: list[dict]) -> None:
    """Differences are of runs with the same seed."""
    seeds = min(map(len, experiment_runs.figures_by(found, "tokens", "variant").values()))
    sentences = [f"After {found[0]['tokens']:,} tokens and {seeds} seeds:"]
    for first, second, most, claim in (
        (SPARK, BASELINE, 0.02, "Spark within 2 % of the dense layer"),
        (SPARK, UNSPLIT, 0.0, "the predictor's split no worse than the same threshold without it"),
        (SPARK_BOTH, SPARK, 0.01, "Spark attention within 1 % of full attention"),
    ):
        loss, other = experiment_runs.paired(
            found, "val/loss", {"variant": first}, {"variant": second}
        )
        text = experiment_record.claim(claim, loss / other - 1, "loss {:+.2%}", most=most)
        sentences.append(text)
    experiment_record.write_text(HERE / "README.md", "verdict", " ".join(sentences))


def _draw(found: list[dict]) -> None:
    flops = experiment_runs.figures_by(found, "flops_active_no_head", "variant")
    with experiment_record.panels(HERE / "figures/loss.png", size=(6, 4)) as panel:
        for name, loss in experiment_runs.figures_by(found, "val/loss", "variant").items():
            experiment_record.bar(panel, flops[name][0], loss, name)
        panel.set(xlabel="forward FLOPs in use a token, without the head")
        panel.set(ylabel="validation loss, nats")
        panel.legend(frameon=False, fontsize=8)


if __name__ == "__main__":
    main()
