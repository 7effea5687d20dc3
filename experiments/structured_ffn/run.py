"""Trains factored feed-forwards beside the dense one: python experiments/structured_ffn/run.py

Trains what is missing in the folder of runs, one after the other, then writes results/runs.json,
figures/loss.png and the tables of README.md. 45 minutes on one core; `--steps` makes it shorter.
"""

import functools
import pathlib

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
    cells = {
        f"{_slug(name)}-seed{seed}": {"variant": name, "seed": seed}
        for seed in range(options.seeds)
        for name in VARIANTS
    }
    training = functools.partial(_flags, steps=options.steps)
    found = [
        cell | _figures(cell["variant"], summary)
        for cell, _, summary in experiment_runs.finished(cells, training, options)
    ]
    if found:
        experiment_record.write_json(HERE / "results/runs.json", {"runs": found})
        _write_runs(found)
        _write_verdict(found)
        _draw(found)


def _slug(name: str) -> str:
    return name.replace(" %", "").replace(",", "").replace(" ", "-")


def _flags(variant: str, seed: int, steps: int) -> list[str]:
    form, options, is_guided = VARIANTS[variant]
    guided = steps // 2 if is_guided else 0
    flags = experiment_runs.flags("sparse", seed, ffn=form, guided=guided)
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


def _write_runs(found: list[dict]) -> None:
    rows = []
    params, forward, flops = (
        experiment_runs.figures_by(found, name, "variant")
        for name in ("params_total", "flops_forward_no_head", "flops_model")
    )
    for name, losses in experiment_runs.figures_by(found, "val/loss", "variant").items():
        loss = statistics.over_seeds(losses)
        rows.append(
            [
                name,
                f"{params[name][0] / 1e6:.2f} M",
                f"{forward[name][0] / 1e6:.2f} M",
                f"{flops[name][0]:.2e}",
                f"{loss.mean:.4f}",
                f"{loss.low:.4f} to {loss.high:.4f}",
            ]
        )
    header = ["feed-forward", "parameters", "forward FLOPs a token, without head"]
    header += ["FLOPs of training", "validation loss, nats", "95 % over seeds"]
    experiment_record.write_table(HERE / "README.md", "runs", header, rows)


def _write_verdict(found: list[dict]) -> None:
    """Differences are of runs with the same seed."""
    sentences = []
    for first, second, claim in (
        ("low rank 29 %, guided", "low rank 29 %", "guided low rank below plain low rank"),
        ("SLTrain, rank 32 and 3 %", "low rank 29 %", "SLTrain below low rank at equal rank"),
        ("low rank 29 %", "block shuffle 29 %", "low rank below block shuffle on text"),
    ):
        loss, other = experiment_runs.paired(
            found, "val/loss", {"variant": first}, {"variant": second}
        )
        if len(loss):
            sentences.append(experiment_record.claim(claim, loss / other - 1, "loss {:+.2%}"))
    experiment_record.write_text(HERE / "README.md", "verdict", " ".join(sentences))


def _draw(found: list[dict]) -> None:
    path = HERE / "figures/loss.png"
    losses = experiment_runs.figures_by(found, "val/loss", "variant")
    with experiment_record.panels(path, 2, size=(9, 4), sharey=True) as panels:
        for panel, figure in zip(panels, ("params_total", "flops_model")):
            for name, across in experiment_runs.figures_by(found, figure, "variant").items():
                experiment_record.bar(panel, across[0], losses[name], name)
        panels[0].set(xlabel="parameters", ylabel="validation loss, nats")
        panels[1].set(xlabel="FLOPs of training, guides included")
        panels[1].legend(frameon=False, fontsize=7)


if __name__ == "__main__":
    main()
