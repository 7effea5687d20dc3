"""Cells of an experiment: what is trained of them, and the rows that finished ones become."""

import json
import pathlib

import numpy as np

from effarch import experiment_runs
from effarch.training import run_folder, writers

CELLS = experiment_runs.over_seeds([{"kind": "a"}, {"kind": "b"}], 3)


def training(kind: str, seed: int) -> list[str]:
    return experiment_runs.flags("configs/x.py", seed, kind=kind, size=2)


def finish(folder: pathlib.Path, loss: float) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / run_folder.SUMMARY).write_text(json.dumps({"loss": loss, "seconds": 90.0}))


def test_missing_cells_are_trained_and_finished_ones_become_rows(tmp_path, monkeypatch):
    asked = {}

    def train(runs, parallel, program):
        assert program == ("-m", "effarch.train")
        asked.update({folder.name: flags for folder, flags in runs.items()})
        finish(tmp_path / "a-seed2", 3.0)
        finish(tmp_path / "b-seed1", 5.0)
        finish(tmp_path / "a-seed1", 2.0)

    monkeypatch.setattr(experiment_runs, "train", train)
    flags = experiment_runs.parser("text", runs=str(tmp_path), seeds=3)
    found = experiment_runs.finished(CELLS, training, flags.parse_args(["--steps=7"]))
    names = ["a-seed0", "b-seed0", "a-seed1", "b-seed1", "a-seed2", "b-seed2"]
    assert list(asked) == names
    assert asked["b-seed1"] == [
        "--config=configs/x.py:kind=b,size=2",
        "--config.seed=1",
        "--config.train.num_steps=7",
    ]
    rows = [cell | summary for cell, folder, summary in found if folder.parent == tmp_path]
    assert rows == [
        {"kind": "a", "seed": 1, "loss": 2.0, "seconds": 90.0},
        {"kind": "b", "seed": 1, "loss": 5.0, "seconds": 90.0},
        {"kind": "a", "seed": 2, "loss": 3.0, "seconds": 90.0},
    ]
    asked.clear()
    again = experiment_runs.finished(CELLS, training, flags.parse_args(["--write_only"]))
    assert again == found and not asked


def test_figures_come_by_seed_and_pairs_by_the_seeds_that_both_have():
    rows = [
        {"kind": "a", "seed": 2, "loss": 3.0},
        {"kind": "b", "seed": 2, "loss": 7.0, "other": 1},
        {"kind": "a", "seed": 0, "loss": 1.0},
        {"kind": "b", "seed": 1, "loss": 6.0},
    ]
    np.testing.assert_array_equal(experiment_runs.figures(rows, "loss", kind="a"), [1.0, 3.0])
    np.testing.assert_array_equal(experiment_runs.figures(rows, "other"), [1])
    assert not len(experiment_runs.figures(rows, "loss", kind="c"))
    by_kind = experiment_runs.figures_by(rows, "loss", "kind")
    assert {kind: values.tolist() for kind, values in by_kind.items()} == {"a": [1, 3], "b": [6, 7]}
    first, second = experiment_runs.paired(rows, "loss", {"kind": "a"}, {"kind": "b"})
    assert (first.tolist(), second.tolist()) == ([3.0], [7.0])


def test_last_means_are_of_the_training_metrics_that_there_are(tmp_path):
    lines = [{"step": n, "kind": "train", "metric/x": float(n)} for n in range(1, 14)]
    lines.insert(4, {"step": 4, "kind": "eval", "metric/x": 100.0})
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / writers.FILE_NAME).write_text(text)
    found = experiment_runs.last_means(tmp_path, ("metric/x", "metric/y"))
    assert found == {"metric/x": 8.5}
