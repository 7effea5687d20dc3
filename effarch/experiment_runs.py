"""Trains the runs of an experiment that are not finished, each by `python -m effarch.train`."""

import concurrent.futures
import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Mapping, Sequence

from effarch.training import run_folder


def train(runs: Mapping[pathlib.Path, Sequence[str]], *, parallel: int = 1) -> None:
    """Run folder -> flags of its training, in this order, `parallel` at a time; finished ones are kept.

    Runs whose programs are equal, such as seeds, share what was compiled, in `.compiled` beside them.
    Raises CalledProcessError if a run fails, when those that were started with it have ended.
    """
    missing = {folder: flags for folder, flags in runs.items() if summary(folder) is None}

    def one(folder: pathlib.Path) -> None:
        cache = {"JAX_COMPILATION_CACHE_DIR": str(folder.absolute().parent / ".compiled")}
        command = [sys.executable, "-m", "effarch.train", *missing[folder], f"--workdir={folder}"]
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
