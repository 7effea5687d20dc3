"""The runs of an experiment: its flags, training what is not finished, reading what is.

Each run is a `python -m effarch.train` in a folder of its own. A *cell* is the fields that tell one run
from the others, its seed among them; a *row* is a cell with the figures of its run.
"""

import argparse
import concurrent.futures
import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from ml_collections import ConfigDict

from effarch import config as config_lib
from effarch.training import run_folder, writers

TRAIN = ("-m", "effarch.train")


def parser(text: str, *, runs: str, seeds: int) -> argparse.ArgumentParser:
    """The flags that `collect` reads and --seeds; `runs` is the default folder."""
    flags = argparse.ArgumentParser(
        description=text, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flags.add_argument("--runs", type=pathlib.Path, default=pathlib.Path(runs))
    flags.add_argument("--seeds", type=int, default=seeds)
    flags.add_argument("--parallel", type=int, default=1, help="runs at a time")
    flags.add_argument("--steps", type=int, default=0, help="of a run; 0 is the config's")
    flags.add_argument("--write_only", action="store_true", help="train nothing")
    return flags


def text_config(
    name: str, *, learning_rate: float, warmup_steps: int, num_steps: int, batch: tuple[int, int]
) -> ConfigDict:
    """The default config for a short run on bytes of the Python standard library.

    `batch` is rows and tokens a row. The rate falls to 0; nothing is kept on the way.
    """
    c = config_lib.default()
    c.name = name
    c.optimizer.learning_rate = learning_rate
    c.optimizer.schedule.warmup_steps = warmup_steps
    c.optimizer.schedule.final_fraction = 0.0
    c.eval.every_steps = c.checkpoint.every_steps = 0
    c.log.tensorboard = False
    c.log.sample_prompts = ()
    c.data.tokenizer, c.data.val_permille = "bytes", 20
    c.data.batch_size, c.data.seq_len = batch
    c.train.num_steps = num_steps
    return c


def flags(config: str | os.PathLike, seed: int, **switches) -> list[str]:
    """Those of the training that a config, its switches and a seed describe."""
    text = ",".join(f"{name}={value}" for name, value in switches.items())
    return [f"--config={config}:{text}", f"--config.seed={seed}"]


def over_seeds(rows: Sequence[Mapping], seeds: int) -> dict[str, dict]:
    """Every row with every seed, by the name of its folder; all rows of a seed before the next."""
    return {
        "-".join([*map(str, row.values()), f"seed{seed}"]): {**row, "seed": seed}
        for seed in range(seeds)
        for row in rows
    }


def finished(
    cells: Mapping[str, Mapping],
    training: Callable[..., Sequence[str]],
    options: argparse.Namespace,
    program: Sequence[str] = TRAIN,
) -> list[tuple[dict, pathlib.Path, dict]]:
    """Trains what is missing, then (cell, folder, summary) of every run that is finished.

    `cells` has them by the names of their folders in --runs; `training(**cell)` is a cell's flags.
    `program` is what Python runs with them.
    """
    runs = {options.runs / name: dict(cell) for name, cell in cells.items()}
    flags = {folder: training(**cell) for folder, cell in runs.items()}
    summaries = collect(flags, options, program)
    return [(runs[folder], folder, found) for folder, found in summaries.items()]


def collect(
    runs: Mapping[pathlib.Path, Sequence[str]],
    options: argparse.Namespace,
    program: Sequence[str] = TRAIN,
) -> dict[pathlib.Path, dict]:
    """Trains what is missing, then folder -> summary of every run that is finished."""
    if not options.write_only:
        extra = [f"--config.train.num_steps={options.steps}"] if options.steps else []
        train(
            {folder: [*flags, *extra] for folder, flags in runs.items()}, options.parallel, program
        )
    return {folder: found for folder in runs if (found := summary(folder))}


def train(
    runs: Mapping[pathlib.Path, Sequence[str]], parallel: int, program: Sequence[str] = TRAIN
) -> None:
    """Run folder -> flags of its training, in this order, `parallel` at a time; finished ones are kept.

    Runs whose programs are equal, such as seeds, share what was compiled, in `.compiled` beside them.
    Raises CalledProcessError if a run fails, when those that were started with it have ended.
    """
    missing = {folder: flags for folder, flags in runs.items() if summary(folder) is None}

    def one(folder: pathlib.Path) -> None:
        cache = {"JAX_COMPILATION_CACHE_DIR": str(folder.absolute().parent / ".compiled")}
        command = [sys.executable, *program, *missing[folder], f"--workdir={folder}"]
        subprocess.run(command, check=True, env=cache | os.environ)

    with concurrent.futures.ThreadPoolExecutor(parallel) as pool:
        started = [pool.submit(one, folder) for folder in missing]
        for future in concurrent.futures.as_completed(started):
            if future.exception():
                pool.shutdown(cancel_futures=True)
                raise future.exception()


def summary(folder: pathlib.Path) -> dict | None:
    """What a finished run reached; None if it is not finished."""
    path = folder / run_folder.SUMMARY
    return json.loads(path.read_text()) if path.exists() else None


def last_means(folder: pathlib.Path, names: Sequence[str]) -> dict[str, float]:
    """Of the training metrics that a run has, means over its last ten lines."""
    last = writers.read_metrics(folder, "train")[-10:]
    return {
        name: float(np.mean([line[name] for line in last])) for name in names if name in last[0]
    }


def figures(rows: Sequence[Mapping], name: str, **cell) -> np.ndarray:
    """A figure of the rows with these fields, in the order of their seeds."""
    found = [row for row in rows if name in row and cell.items() <= row.items()]
    return np.array([row[name] for row in sorted(found, key=lambda row: row["seed"])])


def figures_by(rows: Sequence[Mapping], name: str, field: str) -> dict[str, np.ndarray]:
    """Every value of a field -> a figure of its rows, in the order of their seeds."""
    values = dict.fromkeys(row[field] for row in rows)
    return {value: figures(rows, name, **{field: value}) for value in values}


def paired(
    rows: Sequence[Mapping], name: str, first: Mapping, second: Mapping
) -> tuple[np.ndarray, np.ndarray]:
    """A figure of two cells on the seeds that both have."""
    both = [
        {row["seed"]: row[name] for row in rows if cell.items() <= row.items()}
        for cell in (first, second)
    ]
    seeds = sorted(both[0].keys() & both[1].keys())
    return tuple(np.array([values[seed] for seed in seeds]) for values in both)


def random_batch(rows: int, length: int, num_words: int) -> dict[str, np.ndarray]:
    """A batch of random words, one document a row, for timing."""
    tokens = np.random.default_rng(0).integers(0, num_words, (rows, length + 1), np.int32)
    return {
        "inputs": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "segment_ids": np.ones((rows, length), np.int32),
        "positions": np.tile(np.arange(length, dtype=np.int32), (rows, 1)),
        "loss_weights": np.ones((rows, length), np.float32),
    }
