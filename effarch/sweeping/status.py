"""What became of a run, read from its folder: nothing is kept elsewhere."""

import json
import pathlib
from typing import Any

import filelock

from effarch import config as config_lib
from effarch.sweeping.plan import Run
from effarch.training import run_folder, writers

FINISHED, FAILED, RUNNING, STOPPED, NEW = "finished", "failed", "running", "stopped", "new"
LAST_LINES = 25
_TAIL_BYTES = 16_384


def of(run: Run) -> str:
    """finished, failed, running (a process holds the folder), stopped (can be resumed) or new."""
    if finished(run):
        return FINISHED
    if held(run):
        return RUNNING
    if run.failure.exists():
        return FAILED
    return STOPPED if (run.folder / run_folder.CONFIG).exists() else NEW


def finished(run: Run) -> bool:
    """Whether the folder holds the summary of this very config."""
    if summary(run).get("status") != "finished":
        return False
    return config_lib.fingerprint(run_folder.read_config(run.folder)) == run.fingerprint


def held(run: Run) -> bool:
    """Whether a process trains in the folder; it may be one of a sweep that was killed."""
    if not run.folder.is_dir():
        return False
    lock = filelock.FileLock(run.folder / ".lock")
    try:
        with lock.acquire(timeout=0):
            return False
    except filelock.Timeout:
        return True


def summary(run: Run) -> dict[str, Any]:
    """The run's summary.json; {} before it is finished."""
    path = run.folder / run_folder.SUMMARY
    return json.loads(path.read_text()) if path.exists() else {}


def last_record(run: Run) -> dict[str, Any]:
    """The newest line of metrics.jsonl about a training step, {} if there is none."""
    for line in reversed(_tail(run.folder / writers.FILE_NAME)):
        try:
            record = json.loads(line)
        except json.JSONDecodeError:  # The first line of the tail, or one that is being written.
            continue
        if record.get("kind") == "train":
            return record
    return {}


def write_failure(run: Run, exit_code: int, command: str) -> str:
    """Keeps the last lines of a failed run's log apart; returns the very last one."""
    lines = _tail(run.log)[-LAST_LINES:]
    run.failure.parent.mkdir(parents=True, exist_ok=True)
    run.failure.write_text("\n".join([f"exit code {exit_code}", command, "", *lines]) + "\n")
    return lines[-1] if lines else "no output"


def reason(run: Run) -> str:
    """The last line of a failed run's log."""
    lines = run.failure.read_text().splitlines() if run.failure.exists() else []
    return lines[-1] if lines else ""


def _tail(path: pathlib.Path) -> list[str]:
    """The lines in the last part of a file, empty ones left out."""
    if not path.exists():
        return []
    with path.open("rb") as file:
        file.seek(max(path.stat().st_size - _TAIL_BYTES, 0))
        text = file.read().decode(errors="replace")
    return [line for line in text.splitlines() if line.strip()]
