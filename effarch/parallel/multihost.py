"""Several processes as one run: start-up, what one process decides for all, and what must agree.

One process works without any of it: every function here then does nothing, or just calls what it is
given. Launchers that JAX knows (Slurm's srun, Kubernetes jobs, TPU pods) are detected; elsewhere each
process is told the coordinator's address, the number of processes and its own number.
"""

import importlib.util
import json
import os
import pathlib
import socket
from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

T = TypeVar("T")

START_SECONDS = 300
"""How long the processes of a run wait for each other at the start."""


def start(coordinator: str | None, num_processes: int | None, process_id: int | None) -> None:
    """Joins the processes of a run; call before anything touches a device.

    Without arguments the launcher is detected, and one process starts alone. Raises ValueError for
    arguments that do not fit together and if the others cannot be reached.
    """
    given = {
        "--coordinator": coordinator,
        "--num_processes": num_processes,
        "--process_id": process_id,
    }
    missing = [flag for flag, value in given.items() if value is None]
    if len(missing) == len(given):
        launcher = detect()
        if launcher is not None:
            _initialize(f"{launcher} was detected", {})
        return
    if missing:
        raise ValueError(
            f"{missing[0]} is missing; give all of {', '.join(given)}, or none of them to have the "
            "launcher detected."
        )
    if not 0 <= process_id < num_processes:
        raise ValueError(
            f"--process_id={process_id} must be at least 0 and below --num_processes={num_processes}."
        )
    host, colon, port = coordinator.rpartition(":")
    if not (host and colon and port.isdecimal()):
        raise ValueError(f"--coordinator={coordinator} must be HOST:PORT of process 0.")
    arguments = dict(
        coordinator_address=coordinator, num_processes=num_processes, process_id=process_id
    )
    _initialize(f"--coordinator={coordinator}", arguments)


def detect(environment: dict[str, str] | None = None) -> str | None:
    """The launcher that started this process as one of several; None if there is none.

    Slurm: a step of more than one task. Kubernetes: a job with an index. TPU: a worker of a pod.
    """
    env = os.environ if environment is None else environment
    if (
        "SLURM_PROCID" in env
        and int(env.get("SLURM_STEP_NUM_TASKS", env.get("SLURM_NTASKS", 1))) > 1
    ):
        return "Slurm"
    if "KUBERNETES_SERVICE_HOST" in env and "JOB_COMPLETION_INDEX" in env:
        return "Kubernetes"
    workers = env.get("TPU_WORKER_HOSTNAMES", "")
    if "," in workers or "MEGASCALE_COORDINATOR_ADDRESS" in env:
        return "a TPU pod"
    if environment is None and env.get("JAX_PLATFORMS", "tpu") == "tpu" and _is_cloud_tpu():
        return "a Cloud TPU"
    return None


def _is_cloud_tpu() -> bool:
    """A machine with TPU chips and the library that drives them; it may be one worker of a pod."""
    chips = pathlib.Path("/dev/accel0").exists() or pathlib.Path("/dev/vfio/0").exists()
    return chips and importlib.util.find_spec("libtpu") is not None


def _initialize(how: str, arguments: dict) -> None:
    try:
        jax.distributed.initialize(**arguments, initialization_timeout=START_SECONDS)
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"{how}, but the processes of the run did not find each other ({reason}); start all of "
            "them with the same --coordinator and --num_processes, each with its own --process_id."
        ) from error


def is_first() -> bool:
    """Whether this is process 0: the one that writes what is written once."""
    return jax.process_index() == 0


def name(index: int | None = None, host: str | None = None) -> str:
    """`process 1 on node-b`: this process, or the given one."""
    index = jax.process_index() if index is None else index
    return f"process {index} on {host or socket.gethostname()}"


def barrier(label: str) -> None:
    """Returns when every process is here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(label)


def on_first(decide: Callable[[], T]) -> T:
    """`decide()` of process 0, a JSON value, on all processes; a ValueError there is raised on all."""
    if jax.process_count() == 1:
        return decide()
    answer, error = None, None
    if is_first():
        try:
            answer = {"value": decide()}
        except ValueError as caught:
            error = caught
            answer = {"error": str(caught)}
    found = json.loads(_share(json.dumps(answer)))
    if error is not None:
        raise error
    if "error" in found:
        raise ValueError(found["error"])
    return found["value"]


def check_same(what: str, value: str) -> None:
    """Raises ValueError, naming the process, where `value` is not that of process 0."""
    first = on_first(lambda: value)
    if jax.process_count() == 1:
        return
    differs = multihost_utils.process_allgather(np.array([value != first]))
    if differs.any():
        wrong = int(np.flatnonzero(differs)[0])
        mine = f" ({value} here, {first} there)" if value != first else ""
        raise ValueError(
            f"process {wrong} has another {what} than process 0{mine}; start all processes with the "
            "same command on the same files."
        )


def _share(text: str) -> str:
    """The text of process 0."""
    data = np.frombuffer(text.encode(), np.uint8)
    length = int(multihost_utils.broadcast_one_to_all(np.array(len(data))))
    room = np.zeros(length, np.uint8)
    room[: min(length, len(data))] = data[:length]
    return bytes(np.asarray(multihost_utils.broadcast_one_to_all(room))).decode()


class AnyProcess:
    """Whether any process has said yes: asked every step, known to all at the same later one.

    One process alone knows at once. `agreed` is True from the reading of the first yes on.
    """

    def __init__(self, mesh: Mesh):
        self.agreed = False
        self._place = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        self._any = jax.jit(jnp.max, out_shardings=NamedSharding(mesh, PartitionSpec()))

    def ask(self, mine: bool) -> jax.Array | None:
        """Says yes or no; read the answer later, so that no process waits for another."""
        if jax.process_count() == 1:
            self.agreed |= mine
            return None
        shape = (self._place.mesh.size,)
        said = np.array([mine], np.int32)
        return self._any(jax.make_array_from_callback(shape, self._place, lambda _: said))

    def read(self, answer: jax.Array | None) -> None:
        """Takes an answer of `ask` to the host."""
        if answer is not None:
            self.agreed |= bool(answer)
