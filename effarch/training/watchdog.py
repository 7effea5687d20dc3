"""Ends a run of several processes when one of them dies or sticks, and says which.

Every process writes a sign of life to `<run folder>/hosts/<number>.json` from a thread; process 0 reads
them all, the others read its one and its verdict. A process is lost if its file stops changing for
`timeout` seconds (it died, or is frozen), and stuck if the whole run makes no progress for as long: then
it is the one that got least far. Each process that still can writes the stacks of its threads to
`hosts/stacks-<number>.txt`, says the sentence and exits with code LOST; the same command resumes.

A collective that fails at once, because the connection to a dead process breaks, ends here as well
(`explain`); so does JAX's own abort when the coordinator, process 0, is gone.
"""

import ctypes
import faulthandler
import json
import os
import pathlib
import signal
import sys
import threading
import time
from typing import NoReturn

import jax
from absl import logging

from effarch.parallel import multihost

LOST = 4
"""Exit code of the processes that are left."""
FOLDER, VERDICT = "hosts", "verdict.json"
COMPILING = "compiling"
"""The one thing that may take longer than the timeout."""
_SILENT_PERIODS = 4


class Watchdog:
    """Watches over the processes of a run while it is active; one process alone is not watched.

    timeout: seconds without a sign of life, or without progress; 0 turns it off.
    """

    def __init__(self, folder: pathlib.Path, *, timeout: float):
        self.folder, self.timeout = folder / FOLDER, timeout
        self.index, self.count = jax.process_index(), jax.process_count()
        self.period = min(max(timeout / 20, 0.1), 5.0)
        self.active = self.count > 1 and timeout > 0
        self._doing, self._step, self._moves, self._beats = COMPILING, 0, 0, 0
        self._peers = {index: _Peer() for index in self._watched()}
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

    def _watched(self) -> list[int]:
        return list(range(self.count)) if self.index == 0 else [0, self.index]

    def __enter__(self) -> "Watchdog":
        if self.active:
            self.folder.mkdir(exist_ok=True)
            if self.index == 0:
                (self.folder / VERDICT).unlink(missing_ok=True)
            self._write_beat()
            multihost.barrier("effarch watchdog")  # from here on all files are of this run
            self._catch_abort()
            self._thread.start()
        return self

    def __exit__(self, kind, error, traceback) -> None:
        if not self.active:
            return
        if isinstance(error, jax.errors.JaxRuntimeError | ValueError):  # gloo raises ValueError
            logging.warning("%s: %s", type(error).__name__, " ".join(str(error).split())[:500])
            self.explain()
        self._closing.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()
        signal.signal(signal.SIGABRT, signal.SIG_DFL)

    def beat(self, doing: str, step: int) -> None:
        """Tells what this process begins to do, and at which step."""
        self._doing, self._step, self._moves = doing, step, self._moves + 1

    def explain(self) -> None:
        """After a failed collective: ends the process if another one turns out to be lost."""
        deadline = time.monotonic() + min(self.timeout, 3 * _SILENT_PERIODS * self.period)
        while time.monotonic() < deadline:
            silent = self._silent(_SILENT_PERIODS * self.period)
            if silent:
                self._end(self._lost(silent[0]))
            time.sleep(self.period)

    # The thread.

    def _run(self) -> None:
        moved_at, moves = time.monotonic(), -1
        while not self._closing.wait(self.period):
            # Should this thread not get to run, C code ends the process: it needs no interpreter lock.
            faulthandler.dump_traceback_later(3 * self.timeout, exit=True)
            self._write_beat()
            self._read_peers()
            silent = self._silent(self.timeout)
            if silent:
                self._end(self._lost(silent[0]))
            verdict = _read(self.folder / VERDICT)
            if verdict is not None:
                self._end(verdict["sentence"])
            if self.index == 0:
                beats = [peer.beat for peer in self._peers.values() if peer.beat]
                now_moves = sum(beat["moves"] for beat in beats)
                if now_moves != moves or any(beat["doing"] == COMPILING for beat in beats):
                    moved_at, moves = time.monotonic(), now_moves
                if time.monotonic() - moved_at > self.timeout:
                    self._end(self._stuck(beats))

    def _write_beat(self) -> None:
        self._beats += 1
        beat = {
            "process": self.index,
            "name": multihost.name(),
            "pid": os.getpid(),
            "doing": self._doing,
            "step": self._step,
            "moves": self._moves,
            "beats": self._beats,
        }
        _write(self.folder / f"{self.index}.json", beat)

    def _read_peers(self) -> None:
        for index, peer in self._peers.items():
            beat = _read(self.folder / f"{index}.json")
            if beat is not None and beat != peer.beat:
                peer.beat, peer.changed_at = beat, time.monotonic()

    def _silent(self, seconds: float) -> list[dict]:
        """The last signs of life of the other processes that gave none for so long."""
        now = time.monotonic()
        return [
            peer.beat
            for index, peer in self._peers.items()
            if index != self.index and peer.beat and now - peer.changed_at > seconds
        ]

    def _lost(self, beat: dict) -> str:
        return (
            f"{beat['name']} died or is frozen: it gave no sign of life any more after step "
            f"{beat['step']} ({beat['doing']})"
        )

    def _stuck(self, beats: list[dict]) -> str:
        last = min(beats, key=lambda beat: beat["moves"])
        return (
            f"{last['name']} is stuck: nothing moved for {self.timeout:g} s, and it got least far, to "
            f"{last['doing']} at step {last['step']}"
        )

    def _end(self, reason: str) -> NoReturn:
        """Writes the stacks, tells the others, says the reason and ends this process."""
        if self.index == 0:
            _write(self.folder / VERDICT, {"sentence": reason})
        path = self.folder / f"stacks-{self.index}.txt"
        with open(path, "w", encoding="utf-8") as file:
            faulthandler.dump_traceback(file, all_threads=True)
        print(
            f"error: {reason}. {multihost.name()} ends; its stacks are in {path}. Start all processes "
            "again: the run resumes from its last checkpoint.",
            file=sys.stderr,
            flush=True,
        )
        os._exit(LOST)

    def _catch_abort(self) -> None:
        """JAX aborts a process whose coordinator is gone; before that happens, say who it was."""

        @ctypes.CFUNCTYPE(None, ctypes.c_int)
        def on_abort(_number):
            self.explain()
            self._end(f"{self._peers[0].beat['name']}, the coordinator, cannot be reached")

        self._on_abort = on_abort  # the C library keeps only its address
        install = ctypes.CDLL(None).signal
        install.argtypes, install.restype = [ctypes.c_int, ctypes.c_void_p], ctypes.c_void_p
        install(signal.SIGABRT, ctypes.cast(on_abort, ctypes.c_void_p))


class _Peer:
    """What is known of a process."""

    def __init__(self):
        self.beat: dict | None = None
        self.changed_at = time.monotonic()


def _write(path: pathlib.Path, content: dict) -> None:
    temporary = path.with_suffix(".tmp")
    try:
        temporary.write_text(json.dumps(content))
        temporary.replace(path)
    except OSError as error:  # a full or absent disk must not be taken for a death
        logging.warning("%s cannot be written: %s", path, error)


def _read(path: pathlib.Path) -> dict | None:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None
