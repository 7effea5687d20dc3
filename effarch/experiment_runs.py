"""The runs of an experiment: its flags, training what is not finished, reading what is.

Each run is a `python -m effarch.train` in a folder of its own.
"""

import argparse
import concurrent.futures
import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Mapping, Sequence

from effarch.training import run_folder


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


def collect(
    runs: Mapping[pathlib.Path, Sequence[str]], options: argparse.Namespace
) -> dict[pathlib.Path, dict]:
    """Trains what is missing, then folder -> summary of every run that is finished."""
    if not options.write_only:
        extra = [f"--config.train.num_steps={options.steps}"] if options.steps else []
        train({folder: [*flags, *extra] for folder, flags in runs.items()}, options.parallel)
    return {folder: found for folder in runs if (found := summary(folder))}


def train(runs: Mapping[pathlib.Path, Sequence[str]], parallel: int) -> None:
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
