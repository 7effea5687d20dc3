"""Trains the quickstart and its attention twin on three seeds and writes the tables of the README."""

import argparse
import json
import pathlib
import subprocess
import sys

import numpy as np

from effarch import experiment_record
from effarch.scaling import statistics

HERE = pathlib.Path(__file__).resolve().parent
MIXERS, SEEDS = ("hybrid", "attention"), (0, 1, 2)
WORST = 1.02
"""How much worse than attention the hybrid may be."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=pathlib.Path, default=pathlib.Path("runs"))
    folder = parser.parse_args().runs
    found = {mixer: [_summary(folder, mixer, seed) for seed in SEEDS] for mixer in MIXERS}
    results = {mixer: [_figures(summary) for summary in found[mixer]] for mixer in MIXERS}
    experiment_record.write_json(HERE / "results/runs.json", results)
    _write_runs(results)
    _write_verdict(results)


def _summary(folder: pathlib.Path, mixer: str, seed: int) -> dict:
    """The summary of a run, which is trained if it is not finished."""
    workdir = folder / f"quickstart-{mixer}-seed{seed}"
    if not (workdir / "summary.json").exists():
        command = [sys.executable, "-m", "effarch.train"]
        command += [f"--config=quickstart:mixer={mixer}", f"--config.seed={seed}"]
        subprocess.run([*command, f"--workdir={workdir}"], check=True)
    return json.loads((workdir / "summary.json").read_text())


def _figures(summary: dict) -> dict:
    names = ("params_total", "tokens", "steps", "gzip_bits_per_byte", "xz_bits_per_byte", "seconds")
    figures = {name: summary[name] for name in names}
    return {"bits_per_byte": summary["val/bits_per_byte"], **figures}


def _write_runs(results: dict) -> None:
    rows = [
        [
            mixer,
            seed,
            f"{run['params_total'] / 1e6:.2f} M",
            f"{run['tokens'] / 1e6:.2f} M",
            f"{run['bits_per_byte']:.4f}",
        ]
        for mixer in MIXERS
        for seed, run in zip(SEEDS, results[mixer])
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
