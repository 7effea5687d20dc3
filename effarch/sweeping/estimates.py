"""How long the runs of a sweep would take on a machine that is not here, by `python -m effarch.compile`.

Each different step is compiled once, in a process of its own; seeds, rates and lengths share it.
"""

import json
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Sequence

from effarch import config as config_lib
from effarch.sweeping.plan import Run

DOES_NOT_FIT = 1
_NOT_THE_STEP = ("name", "seed", "log", "eval", "checkpoint")
"""Sections of the config that the compiled step does not depend on."""


def seconds(runs: Sequence[Run], target: str) -> list[float | None]:
    """The training time of each run on `target` (v5p:4x4x4, h100), None if its step does not fit.

    Raises ValueError for an unknown target and where its compiler is not installed.
    """
    steps: dict[str, float | None] = {}
    for run in runs:
        key = _step(run)
        if key not in steps:
            steps[key] = _compile(run, target)
    times = [steps[_step(run)] for run in runs]
    return [time and time * run.config.train.num_steps for time, run in zip(times, runs)]


def _step(run: Run) -> str:
    """What two runs with the same compiled step have in common."""
    fields = json.loads(config_lib.to_json(run.config))
    for name in _NOT_THE_STEP:
        fields.pop(name)
    for name in ("learning_rate", "schedule"):
        fields["optimizer"].pop(name)
    fields["train"].pop("num_steps")
    return json.dumps(fields, sort_keys=True)


def _compile(run: Run, target: str) -> float | None:
    """Seconds of a step."""
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "config.json"
        path.write_text(config_lib.to_json(run.config))
        command = [sys.executable, "-m", "effarch.compile", f"--config={path}"]
        done = subprocess.run(
            [*command, f"--target={target}", "--json"], capture_output=True, text=True
        )
    if done.returncode not in (0, DOES_NOT_FIT):
        lines = done.stderr.strip().splitlines() or ["no message"]
        raise ValueError(f"--target={target}, {run.name}: {lines[-1].removeprefix('error: ')}")
    return json.loads(done.stdout)["seconds"] if done.returncode == 0 else None
