"""Active neurons of ReLU and SiLU models over training: python experiments/sparsing_law/run.py

Trains what is missing in the folder of runs, measures PPL-1% at every checkpoint that was kept, then
writes results/runs.json, figures/ratio.png and the tables of README.md. Half an hour on one core;
`--steps` makes it shorter (the checkpoints are a tenth of it apart).
"""

import functools
import json
import pathlib
import subprocess
import sys

import numpy as np

from effarch import experiment_record, experiment_runs
from effarch.analysis import sparsing_law
from effarch.scaling import statistics

HERE = pathlib.Path(__file__).resolve().parent
STEPS, ROWS = 400, 4
VARIANTS = {"relu": ["--config=sparse:ffn=relu"], "silu": ["--config=sparse:ffn=glu"]}
VARIANTS["silu"] += ["--config.model.blocks.glu.activation=silu"]


def main() -> None:
    flags = experiment_runs.parser(__doc__, runs="runs/sparsing_law", seeds=3)
    flags.set_defaults(steps=STEPS)
    options = flags.parse_args()
    cells = {
        f"{name}-seed{seed}": {"variant": name, "seed": seed}
        for seed in range(options.seeds)
        for name in VARIANTS
    }
    training = functools.partial(_flags, steps=options.steps)
    found: dict[str, list] = {name: [] for name in VARIANTS}
    for cell, folder, summary in experiment_runs.finished(cells, training, options):
        if not options.write_only:
            _measure(folder)
        found[cell["variant"]].append(_figures(folder, summary))
    if all(found.values()):
        experiment_record.write_json(HERE / "results/runs.json", found)
        _write_runs(found)
        _write_verdict(found)
        _draw(found)


def _flags(variant: str, seed: int, steps: int) -> list[str]:
    apart = max(steps // 10, 1)
    flags = [*VARIANTS[variant], f"--config.seed={seed}"]
    flags += [f"--config.optimizer.schedule.warmup_steps={min(50, steps // 4)}"]
    return flags + [f"--config.checkpoint.{x}={apart}" for x in ("every_steps", "keep_period")]


def _result(folder: pathlib.Path) -> pathlib.Path:
    return folder / "analysis/sparsity.json"


def _measure(folder: pathlib.Path) -> None:
    if not _result(folder).exists():
        flags = [f"--run={folder}", "--what=sparsity", f"--rows={ROWS}"]
        subprocess.run([sys.executable, "-m", "effarch.analysis", *flags], check=True)


def _figures(folder: pathlib.Path, summary: dict) -> dict:
    """Tokens and mean active ratio of every checkpoint; the loss at the end."""
    checkpoints = json.loads(_result(folder).read_text())["checkpoints"]
    a_step = summary["tokens"] / summary["steps"]
    return {
        "loss": summary["val/loss"],
        "tokens": [int(step) * a_step for step in checkpoints],
        "active_ratio": [float(np.mean(x["active_ratio"])) for x in checkpoints.values()],
        "nonzero_ratio": [float(np.mean(x["nonzero_ratio"])) for x in checkpoints.values()],
    }


def _settled(run: dict) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and ratios without the first two tenths, in which the learning rate rises."""
    first = len(run["tokens"]) // 5
    return np.array(run["tokens"][first:]), np.array(run["active_ratio"][first:])


def _write_runs(found: dict) -> None:
    rows = []
    for name, runs in found.items():
        for seed, run in enumerate(runs):
            tokens, ratio = _settled(run)
            try:
                fit = sparsing_law.fit(name, tokens, ratio)
                limit = fit.params["limit"]
                law = f"{limit:.1%} (R2 {fit.r2:.2f})" if 0 <= limit <= 1 else "beyond 0 to 100 %"
            except ValueError:
                law = "no fit"
            ratios = (ratio[0], ratio[-1], run["nonzero_ratio"][-1])
            shown = [f"{value:.1%}" for value in ratios]
            rows.append([name, seed, *shown, law, f"{run['loss']:.4f}"])
    header = ["activation", "seed", "PPL-1 % ratio after warm-up", "at the end", "not 0 at the end"]
    header += ["limit of the law", "validation loss, nats"]
    experiment_record.write_table(HERE / "README.md", "runs", header, rows)


def _write_verdict(found: dict) -> None:
    ends = {name: [_settled(run)[1] for run in runs] for name, runs in found.items()}
    pairs = min(map(len, found.values()))
    last = {name: np.array([ratio[-1] for ratio in ratios]) for name, ratios in ends.items()}
    loss = {name: np.array([run["loss"] for run in runs]) for name, runs in found.items()}
    change = {name: [r[-1] - r[0] for r in ratios] for name, ratios in ends.items()}
    claims = (
        ("the ratio of ReLU falls", np.array(change["relu"]), -1),
        ("the ratio of SiLU rises", np.array(change["silu"]), 1),
        ("ReLU needs fewer neurons than SiLU", last["relu"][:pairs] - last["silu"][:pairs], -1),
    )
    sentences = []
    for claim, values, sign in claims:
        verdict = experiment_record.judged(statistics.over_seeds(-sign * values))
        points = statistics.over_seeds(100 * values)
        sentences.append(
            f"*{claim}* {verdict} ({points.mean:+.1f} points, 95 % interval {points.low:+.1f} to "
            f"{points.high:+.1f})."
        )
    ratio = statistics.over_seeds(loss["relu"][:pairs] / loss["silu"][:pairs] - 1)
    sentences.append(f"The loss of ReLU is {ratio.mean:+.2%} from that of SiLU.")
    experiment_record.write_text(HERE / "README.md", "verdict", " ".join(sentences))


def _draw(found: dict) -> None:
    with experiment_record.panels(HERE / "figures/ratio.png", size=(6, 4)) as panel:
        for index, (name, runs) in enumerate(found.items()):
            for seed, run in enumerate(runs):
                style = dict(color=f"C{index}", ms=3)
                style["label"] = {"relu": "ReLU", "silu": "SiLU"}[name] if seed == 0 else None
                panel.plot(run["tokens"], run["active_ratio"], "o-", **style)
        panel.set(xlabel="tokens", ylabel="active neurons, PPL-1 %", ylim=(0, None))
        panel.legend(frameon=False)


if __name__ == "__main__":
    main()
