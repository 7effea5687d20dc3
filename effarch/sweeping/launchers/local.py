"""Processes on this machine.

With `gpus` a run sees only its own: place i of `parallel` takes GPUs i gpus ... (i + 1) gpus - 1.
"""

import os
import pathlib
import signal
import subprocess
from collections.abc import Mapping, Sequence

from effarch import names


class Local:
    """At most `parallel` processes at a time (default 1)."""

    def __init__(
        self, root: pathlib.Path, *, parallel: int, gpus: int, options: Mapping[str, str]
    ) -> None:
        names.refuse_unknown(options, (), "--launcher_options")
        self.capacity, self._gpus = parallel or 1, gpus
        self._places: list[_Process | None] = [None] * self.capacity

    def start(self, name: str, command: Sequence[str], log: pathlib.Path) -> "_Process":
        place = next(i for i, job in enumerate(self._places) if job is None or job.ended)
        environment = dict(os.environ)
        if self._gpus:
            own = range(place * self._gpus, (place + 1) * self._gpus)
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, own))
        with log.open("ab") as output:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,  # Ctrl-C reaches the sweep, which stops its runs in order.
            )
        self._places[place] = _Process(process)
        return self._places[place]

    def attach(self, id: str, log: pathlib.Path) -> None:
        return None  # Whoever holds a run's folder is waited for.


class _Process:
    id = None

    def __init__(self, process: subprocess.Popen) -> None:
        self._process = process

    @property
    def ended(self) -> bool:
        return self._process.poll() is not None

    def poll(self) -> int | None:
        return self._process.poll()

    def stop(self) -> None:
        if not self.ended:
            self._process.send_signal(signal.SIGTERM)
