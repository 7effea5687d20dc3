"""Runs a sweep: starts what is not finished, watches, keeps failures apart, stops when told to."""

import pathlib
import shlex
import signal
import sys
import time
from collections.abc import Sequence

from effarch import config as config_lib
from effarch.sweeping import display, launchers, status
from effarch.sweeping.plan import Run

INTERRUPTED = {signal.SIGTERM: 143, signal.SIGINT: 130}
SOME_FAILED = 1


class Sweep:
    """The runs of a sweep and who works on them."""

    def __init__(
        self,
        runs: Sequence[Run],
        launcher: launchers.Launcher,
        *,
        retry_failed: bool = False,
        shown: display.Display | None = None,
        poll_seconds: float = 0.5,
    ) -> None:
        self.runs, self.launcher = list(runs), launcher
        self.shown = shown or display.Display(runs)
        self.poll_seconds = poll_seconds
        if retry_failed:
            for run in runs:
                run.failure.unlink(missing_ok=True)
        self._waiting = [
            run for run in runs if status.of(run) not in (status.FINISHED, status.FAILED)
        ]
        self._active: dict[str, tuple[Run, launchers.Job, int]] = {}
        self._outlived: list[Run] = []
        self._signal: int | None = None

    def run(self) -> int:
        """Works until every run is finished or failed, or until SIGTERM or SIGINT.

        Then the runs are told to save and stop. Returns 0, SOME_FAILED, or 143 and 130 for signals.
        """
        before = {number: signal.signal(number, self._ask) for number in INTERRUPTED}
        try:
            with self.shown:
                states = [status.of(run) for run in self.runs]
                self.shown.start(*map(states.count, (status.FINISHED, status.FAILED)))
                self._adopt()
                self._outlived = [run for run in self._waiting if status.held(run)]
                told_to_stop = False
                while self._active or (self._waiting and self._signal is None):
                    self._settle()
                    if self._signal is None:
                        self._start()
                    elif not told_to_stop:
                        told_to_stop = True
                        for _, job, _ in self._active.values():
                            job.stop()
                    self.shown.update(set(self._active))
                    time.sleep(self.poll_seconds)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        if self._signal is not None:
            return INTERRUPTED[self._signal]
        return SOME_FAILED if any(status.of(run) == status.FAILED for run in self.runs) else 0

    def _ask(self, number: int, _frame) -> None:
        """The first signal stops every run in order; the second ends the sweep at once."""
        if self._signal is not None:
            raise SystemExit(INTERRUPTED[number])
        self._signal = number

    def _adopt(self) -> None:
        """Takes over the cluster's jobs of a sweep that was killed."""
        for run in list(self._waiting):
            if not _job_file(run).exists():
                continue
            job = self.launcher.attach(_job_file(run).read_text(), run.log)
            if job is not None:
                self._waiting.remove(run)
                self._active[run.name] = (run, job, _step(run))

    def _start(self) -> None:
        """Gives free places to runs that nobody works on; processes of an earlier sweep hold theirs."""
        self._outlived = [run for run in self._outlived if status.held(run)]
        for run in list(self._waiting):
            taken = len(self._active) + len(self._outlived)
            if taken >= self.launcher.capacity or self._signal is not None:
                return
            if run.trunk and status.of(run.trunk) not in (status.FINISHED, status.FAILED):
                continue
            now = status.of(run)
            if now == status.RUNNING:  # By one of those processes.
                continue
            self._waiting.remove(run)
            if now == status.FINISHED:
                self.shown.finished(run)
                continue
            first_step = _step(run)
            job = self.launcher.start(run.name, self._command(run), run.log)
            if job.id is not None:
                _job_file(run).parent.mkdir(exist_ok=True)
                _job_file(run).write_text(job.id)
            self._active[run.name] = (run, job, first_step)
            self.shown.started(run, resumed=now == status.STOPPED)

    def _settle(self) -> None:
        """Looks after processes that ended."""
        for run, job, first_step in list(self._active.values()):
            code = job.poll()
            if code is None:
                continue
            del self._active[run.name]
            _job_file(run).unlink(missing_ok=True)
            if code == 0 and status.finished(run):
                self.shown.finished(run)
            elif self._signal is not None:
                self.shown.stopped(run)
            elif code in INTERRUPTED.values() and _step(run) > first_step:
                self._waiting.append(run)  # A cluster wanted its machine: the run saved, resume it.
                self.shown.stopped(run)
            else:
                self.shown.failed(run, status.write_failure(run, code, shlex.join(_train(run))))

    def _command(self, run: Run) -> list[str]:
        for path in (run.config_file, run.log):
            path.parent.mkdir(parents=True, exist_ok=True)
        run.config_file.write_text(config_lib.to_json(run.config) + "\n")
        return _train(run)


def _train(run: Run) -> list[str]:
    flags = [f"--config={run.config_file.resolve()}", f"--workdir={run.folder.resolve()}"]
    if run.trunk and status.finished(run.trunk):
        flags.append(f"--trunk={run.trunk.folder.resolve()}")
    return [sys.executable, "-m", "effarch.train", *flags]


def _job_file(run: Run) -> pathlib.Path:
    """Holds the cluster's name of the job that works on a run."""
    return run.root / "jobs" / f"{run.name}.txt"


def _step(run: Run) -> int:
    return int(status.last_record(run).get("step", 0))


def lock_path(root: pathlib.Path) -> pathlib.Path:
    """Held by the one sweep that works in a folder."""
    return root / ".sweep.lock"
