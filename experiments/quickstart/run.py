"""Trains the quickstart and its attention twin on three seeds and writes the tables of the README."""

import functools
import pathlib

import numpy as np

from effarch import experiment_record, experiment_runs
from effarch.scaling import statistics

HERE = pathlib.Path(__file__).resolve().parent
MIXERS = ("hybrid", "attention")
WORST = 1.02
"""How much worse than attention the hybrid may be."""


def main() -> None:
    options = experiment_runs.parser(__doc__, runs="runs", seeds=3).parse_args()
    cells = {
        f"quickstart-{mixer}-seed{seed}": {"mixer": mixer, "seed": seed}
        for mixer in MIXERS
        for seed in range(options.seeds)
    }
    training = functools.partial(experiment_runs.flags, "quickstart")
    results = {mixer: [] for mixer in MIXERS}
    for cell, _, summary in experiment_runs.finished(cells, training, options):
        results[cell["mixer"]].append({"seed": cell["seed"]} | _figures(summary))
    experiment_record.write_json(HERE / "results/runs.json", results)
    _write_runs(results)
    _write_verdict(results)


def _figures(summary: dict) -> dict:
    names = ("params_total", "tokens", "steps", "gzip_bits_per_byte", "xz_bits_per_byte", "seconds")
    figures = {name: summary[name] for name in names}
    return {"bits_per_byte": summary["val/bits_per_byte"], **figures}


def _write_runs(results: dict) -> None:
    rows = [
        [
            mixer,
            run["seed"],
            f"{run['params_total'] / 1e6:.2f} M",
            f"{run['tokens'] / 1e6:.2f} M",
            f"{run['bits_per_byte']:.4f}",
        ]
        for mixer in MIXERS
        for run in results[mixer]
    ]
    header = ["mixer", "seed", "parameters", "tokens", "bits per byte"]
    experiment_record.write_table(HERE / "README.md", "runs", header, rows)


def _write_verdict(results: dict) -> None:
    bits = {mixer: np.array([run["bits_per_byte"] for run in results[mixer]]) for mixer in MIXERS}
    gzip, xz = (results["hybrid"][0][f"{name}_bits_per_byte"] for name in ("gzip", "xz"))
    ratio = statistics.over_seeds(bits["hybrid"] / bits["attention"])
    worst = bits["hybrid"].max()
    below = [name for name, value in (("gzip", gzip), ("xz", xz)) if worst < value]
    keeps_up = (bits["hybrid"] <= WORST * bits["attention"]).all()
    text = (
        f"`gzip -9` makes {gzip:.4f} of the same bytes, `xz -9e` {xz:.4f}. **Verdict.** On every seed "
        f"the hybrid is below {' and '.join(below) or 'neither'}. Hybrid / attention in bits per byte: "
        f"{ratio.mean:.4f} (95% interval over seeds {ratio.low:.4f} to {ratio.high:.4f}); "
        f"{'on no seed' if keeps_up else 'on some seed'} is it more than 2% worse."
    )
    experiment_record.write_text(HERE / "README.md", "verdict", text)


if __name__ == "__main__":
    main()
