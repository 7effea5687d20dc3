"""Does a delta rule learn parity only with negative eigenvalues?

    python experiments/parity/run.py --seeds=3

Trains what is missing in --runs, scores every run on rows of LENGTHS, then writes results/runs.json and
the table of README.md; --write_only trains nothing.
"""

import json
import pathlib
import subprocess
import sys

import numpy as np

from effarch import experiment_record, experiment_runs

HERE = pathlib.Path(__file__).resolve().parent
MIXERS = ("delta_net", "gated_delta_net")
TRAINED = 32
LENGTHS = (TRAINED, 64, 256)
SCORE = "scored.json"
LEARNED = 0.9
"""Scaled accuracy from which parity counts as learned."""
CELLS = [(mixer, negative) for mixer in MIXERS for negative in (False, True)]


def main() -> None:
    flags = experiment_runs.parser(__doc__, runs="runs/parity", seeds=3)
    options = flags.parse_args()
    cells = {
        f"{mixer}-{'negative' if negative else 'positive'}-seed{seed}": {
            "mixer": mixer,
            "negative": negative,
            "seed": seed,
        }
        for seed in range(options.seeds)
        for mixer, negative in CELLS
    }
    found = [
        cell | {"accuracy": _accuracy(folder), "seconds": summary["seconds"]}
        for cell, folder, summary in experiment_runs.finished(cells, _flags, options)
    ]
    if found:
        experiment_record.write_json(HERE / "results/runs.json", {"runs": found})
        _write(found)


def _flags(mixer: str, negative: bool, seed: int) -> list[str]:
    return [
        *experiment_runs.flags("tasks", seed, task="state_tracking", mixer=mixer),
        "--config.data.task.state_tracking.group=Z2",
        f"--config.model.blocks.{mixer}.allow_neg_eigval={negative}",
    ]


def _accuracy(folder: pathlib.Path) -> dict[str, float]:
    """Row length -> part of the prefixes whose parity is told, kept in the run's folder."""
    path = folder / SCORE
    if not path.exists():
        experiment_record.write_json(
            path, {str(length): _score(folder, length) for length in LENGTHS}
        )
    return json.loads(path.read_text())


def _score(folder: pathlib.Path, length: int) -> float:
    command = [sys.executable, "-m", "effarch.evaluate", f"--run={folder}", f"--seq_len={length}"]
    done = subprocess.run(
        [*command, "--max_batches=4"], check=True, stdout=subprocess.PIPE, text=True
    )
    return json.loads(done.stdout)["accuracy"]


def _scaled(found: list[dict], mixer: str, negative: bool, length: int) -> np.ndarray:
    """(accuracy - 1/2) / (1/2) of every seed: 0 is guessing."""
    runs = [run for run in found if (run["mixer"], run["negative"]) == (mixer, negative)]
    return np.array([2 * run["accuracy"][str(length)] - 1 for run in runs])


def _write(found: list[dict]) -> None:
    rows = []
    for mixer, negative in CELLS:
        values = [_scaled(found, mixer, negative, length) for length in LENGTHS]
        if len(values[0]):
            means = [f"{x.mean():.3f} ({x.min():.3f} to {x.max():.3f})" for x in values]
            rows.append([mixer, "-1 to 1" if negative else "0 to 1", *means, len(values[0])])
    header = ["mixer", "eigenvalues", *(f"{length} tokens" for length in LENGTHS), "seeds"]
    experiment_record.write_table(HERE / "README.md", "accuracy", header, rows)
    experiment_record.write_text(HERE / "README.md", "verdict", _verdict(found))


def _verdict(found: list[dict]) -> str:
    start = f"{experiment_record.effort(found)} "
    if not all(len(_scaled(found, *cell, TRAINED)) for cell in CELLS):
        return start + "No verdict yet: not every cell has a run."
    sentences = []
    for mixer in MIXERS:
        learned = [
            f"{_learned(found, mixer, True, length)} with negative eigenvalues and "
            f"{_learned(found, mixer, False, length)} without at {length} bits"
            for length in (TRAINED, LENGTHS[-1])
        ]
        sentences.append(f"{mixer}: {', '.join(learned)}")
    return start + (
        f"**Verdict.** Seeds with a scaled accuracy of at least {LEARNED:g}: {'; '.join(sentences)}."
    )


def _learned(found: list[dict], mixer: str, negative: bool, length: int) -> str:
    values = _scaled(found, mixer, negative, length)
    return f"{int((values >= LEARNED).sum())} of {len(values)}"


if __name__ == "__main__":
    main()
