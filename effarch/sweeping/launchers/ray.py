"""Jobs of a Ray cluster, through its job API: pip install effarch[clusters].

`--launcher_options`: address (default http://127.0.0.1:8265, or $RAY_ADDRESS), cpus (of a run, default
1). The cluster must see this working directory and the sweep's folder under the same paths.
"""

import os
import pathlib
import shlex
from collections.abc import Mapping, Sequence

from effarch import names

MANY = 1000
STOP_SECONDS = "120"
"""Time that a stopped run has to save; Ray's own default is 3."""
_ADDRESS = "http://127.0.0.1:8265"


class Ray:
    """At most `parallel` jobs submitted (default: all; Ray starts what fits)."""

    def __init__(
        self, root: pathlib.Path, *, parallel: int, gpus: int, options: Mapping[str, str]
    ) -> None:
        try:
            from ray import job_submission
        except ImportError as error:
            raise ValueError(
                "--launcher=ray needs the package ray[default]; pip install effarch[clusters]."
            ) from error
        names.refuse_unknown(options, ("address", "cpus"), "--launcher_options")
        address = options.get("address") or os.environ.get("RAY_ADDRESS") or _ADDRESS
        try:
            self._client = job_submission.JobSubmissionClient(address)
        except (ConnectionError, RuntimeError) as error:
            raise ValueError(
                f"--launcher_options=address={address}: no Ray cluster answers ({error}); start one."
            ) from error
        self.capacity = parallel or MANY
        self._resources = {"entrypoint_num_cpus": float(options.get("cpus", 1))}
        if gpus:
            self._resources["entrypoint_num_gpus"] = float(gpus)

    def start(self, name: str, command: Sequence[str], log: pathlib.Path) -> "_Job":
        # exec: the job's SIGTERM reaches the run itself, not a shell.
        entry = (
            f"cd {shlex.quote(os.getcwd())} && exec {shlex.join(command)} "
            f">> {shlex.quote(str(log.resolve()))} 2>&1"
        )
        environment = {"RAY_JOB_STOP_WAIT_TIME_S": STOP_SECONDS}
        if "PYTHONPATH" in os.environ:
            environment["PYTHONPATH"] = os.environ["PYTHONPATH"]
        job = self._client.submit_job(
            entrypoint=entry,
            metadata={"run": name},
            runtime_env={"env_vars": environment},
            **self._resources,
        )
        return _Job(self._client, job, log)

    def attach(self, id: str, log: pathlib.Path) -> "_Job | None":
        known = {info.submission_id for info in self._client.list_jobs()}
        return _Job(self._client, id, log) if id in known else None


class _Job:
    def __init__(self, client, job: str, log: pathlib.Path) -> None:
        self._client, self.id, self._log = client, job, log

    def poll(self) -> int | None:
        info = self._client.get_job_info(self.id)
        if not info.status.is_terminal():
            return None
        if str(info.status.value) == "SUCCEEDED":
            return 0
        code = info.driver_exit_code
        if code is None:
            with self._log.open("a") as output:
                output.write(f"Ray job {self.id}: {info.message}\n")
        return code or (143 if str(info.status.value) == "STOPPED" else 1)

    def stop(self) -> None:
        self._client.stop_job(self.id)
