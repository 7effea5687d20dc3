"""Slurm jobs, through submitit: pip install effarch[clusters].

`--launcher_options` are submitit's parameters: "partition=gpu,time=240,cpus_per_task=8,mem_gb=64",
`time` in minutes; a name that submitit does not know is passed to sbatch with `slurm_` before it. A job
that is preempted or reaches its time limit saves, is queued again and resumes.
"""

import math
import pathlib
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence

MANY = 1000
_SHARED = ("cpus_per_task", "mem_gb", "gpus_per_node", "tasks_per_node", "nodes", "name")
_LOOK_SECONDS = 10.0
_SAVE_SECONDS = 80.0
"""submitit warns 90 seconds before the end."""


class Slurm:
    """At most `parallel` jobs in the queue (default: all)."""

    def __init__(
        self, root: pathlib.Path, *, parallel: int, gpus: int, options: Mapping[str, str]
    ) -> None:
        try:
            import submitit
        except ImportError as error:
            raise ValueError(
                "--launcher=slurm needs the package submitit; pip install effarch[clusters]."
            ) from error
        self._submitit, self._folder = submitit, root / "slurm" / "%j"
        self.capacity = parallel or MANY
        if shutil.which("sbatch") is None:
            raise ValueError("--launcher=slurm: there is no sbatch; start it on a login node.")
        self._executor = submitit.AutoExecutor(folder=self._folder, cluster="slurm")
        if gpus:
            self._executor.update_parameters(gpus_per_node=gpus)
        for name, value in options.items():
            number = int(value) if value.isdigit() else value
            field = name if name in _SHARED else f"slurm_{name.removeprefix('slurm_')}"
            try:
                self._executor.update_parameters(**{field: number})
            except (NameError, ValueError, TypeError) as error:
                raise ValueError(f"--launcher_options: {name}={value}: {error}") from error
        self._queue: set[str] = set()
        self._looked = 0.0

    def start(self, name: str, command: Sequence[str], log: pathlib.Path) -> "_Job":
        self._executor.update_parameters(name=name)
        return _Job(self, self._executor.submit(Command(list(command), str(log.resolve()))), log)

    def attach(self, id: str, log: pathlib.Path) -> "_Job":
        return _Job(self, self._submitit.SlurmJob(self._folder, id), log)

    def queued(self, job: str) -> bool:
        """Whether the queue held the job within the last _LOOK_SECONDS, all jobs asked for at once."""
        if time.monotonic() - self._looked > _LOOK_SECONDS:
            asked = subprocess.run(
                ["squeue", "--me", "--noheader", "--format=%A"],
                capture_output=True,
                text=True,
                check=False,
            )
            if asked.returncode:  # The controller is busy: no news.
                return True
            self._queue, self._looked = set(asked.stdout.split()), time.monotonic()
        return job in self._queue


class Command:
    """What a job runs; submitit pickles it and calls it on the node.

    Slurm signals every process of a job: SIGTERM reaches the run itself, which saves and stops.
    """

    def __init__(self, command: list[str], log: str) -> None:
        self.command, self.log = command, log
        self._process: subprocess.Popen | None = None

    def __call__(self) -> int:
        with open(self.log, "ab") as output:
            self._process = subprocess.Popen(
                self.command, stdout=output, stderr=subprocess.STDOUT, preexec_fn=_keep_warnings
            )
        self._wait()
        return self._process.returncode

    def checkpoint(self):
        """Called by submitit before the job is taken away: the run saves, the job is queued again."""
        import submitit

        if self._process is not None:
            self._process.terminate()
            self._wait(_SAVE_SECONDS)
        return submitit.helpers.DelayedSubmission(Command(self.command, self.log))

    def _wait(self, seconds: float = math.inf) -> None:
        """Polls: `checkpoint` runs in a signal handler above a wait, whose lock it could not take."""
        deadline = time.monotonic() + seconds
        while self._process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.2)


def _keep_warnings() -> None:
    """submitit's warning signals are for the process above, which then calls `checkpoint`."""
    for number in (signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)


class _Job:
    def __init__(self, slurm: Slurm, job, log: pathlib.Path) -> None:
        self._slurm, self._job, self._log, self.id = slurm, job, log, job.job_id
        self._missed_at: float | None = None

    def poll(self) -> int | None:
        if self._has_result():
            try:
                return int(self._job.result())
            except Exception as error:  # Whatever happened on the node is the run's failure.
                return self._lost(str(error))
        if self._slurm.queued(self.id):
            self._missed_at = None
        elif self._missed_at is None:
            self._missed_at = time.monotonic()
        elif time.monotonic() - self._missed_at > 2 * _LOOK_SECONDS:
            return self._lost("it left the queue without a result (cancelled, or its node failed)")
        return None

    def stop(self) -> None:
        self._job.cancel(check=False)

    def _has_result(self) -> bool:
        """By listing the folder, so that a network file system looks again; `done` would ask sacct."""
        paths = self._job.paths
        return paths.folder.exists() and paths.result_pickle in paths.folder.iterdir()

    def _lost(self, reason: str) -> int:
        with self._log.open("a") as output:
            output.write(f"{self._job.stderr() or ''}\nSlurm job {self.id}: {reason}\n")
        return 1
