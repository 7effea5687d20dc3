"""Where the runs of a sweep are started. To add one: a file here and a line below.

A launcher is `Launcher(root, *, parallel, gpus, options)`; it starts commands that write to a log.
"""

import importlib
import pathlib
from collections.abc import Mapping, Sequence
from typing import Protocol

from effarch import names

KINDS = {
    "local": "effarch.sweeping.launchers.local:Local",
    "slurm": "effarch.sweeping.launchers.slurm:Slurm",
    "ray": "effarch.sweeping.launchers.ray:Ray",
}
"""Imported on use: two of them need an optional package."""


class Job(Protocol):
    """A command that was started."""

    id: str | None
    """What `attach` finds it by from another process; None if it cannot."""

    def poll(self) -> int | None:
        """The exit code, None while it waits or runs; -N for the signal N."""

    def stop(self) -> None:
        """Asks the command to save and stop (SIGTERM)."""


class Launcher(Protocol):
    """A place for commands."""

    capacity: int
    """Commands that may be waiting or running at a time."""

    def start(self, name: str, command: Sequence[str], log: pathlib.Path) -> Job:
        """Starts a command in the working directory of this process; its output goes to `log`."""

    def attach(self, id: str, log: pathlib.Path) -> Job | None:
        """The job that an earlier process started, None if nobody knows it."""


def build(
    kind: str, root: pathlib.Path, *, parallel: int, gpus: int, options: Mapping[str, str]
) -> Launcher:
    """The launcher named `kind`.

    Args:
      root: the sweep's folder.
      parallel: runs at a time; 0 takes the launcher's default.
      gpus: GPUs a run.
      options: what the cluster wants to know, see the launcher's file.
    """
    module, _, name = names.lookup(KINDS, kind, "--launcher").partition(":")
    constructor = getattr(importlib.import_module(module), name)
    return constructor(root, parallel=parallel, gpus=gpus, options=options)
