"""The metrics of a run: `metrics.jsonl` and TensorBoard events.

One line a record: `{"step": 10, "kind": "train", "loss": 2.5, ...}`. Floats are written so that
reading gives the same float64 back. JSON has no word for values that are not finite: they are the
strings "nan", "inf" and "-inf", which `read_metrics` turns back into floats. Keys that begin with
`time/` depend on the clock; all others depend on config and step alone, so that a resumed run
repeats them bit for bit.
"""

import json
import math
import os
import pathlib
import time
from collections.abc import Mapping

import numpy as np
import tensorboardX
from absl import logging

FILE_NAME = "metrics.jsonl"
KINDS = ("train", "eval", "rounding")
_EVENT_SECONDS = 5.0
"""How long TensorBoard's events wait for their file at the most."""
_SPECIAL = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


class MetricsWriter:
    """Appends records to a run folder, starting behind those of the checkpoint's step.

    The file is cut back first: records of steps past `start_step` and a half-written last line go.
    Nothing precedes a start at step 0, so there the file is emptied. Write every record of a step
    and call `sync` before the checkpoint of that step is saved, else a crash can lose the record.
    A record of `start_step` that the file holds already, but for the clock, is not written again:
    the last evaluation of a finished run that is started once more.
    """

    def __init__(
        self, folder: str | os.PathLike, *, start_step: int = 0, tensorboard: bool = True
    ) -> None:
        folder = pathlib.Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / FILE_NAME
        self._known = [
            _identity(record)
            for record in _cut_back(self.path, start_step)
            if record["step"] == start_step
        ]
        self._file = self.path.open("a", encoding="utf-8", newline="\n")
        self._events = None
        if tensorboard:
            self._events = tensorboardX.SummaryWriter(
                str(folder / "tensorboard"),
                purge_step=start_step + 1 if start_step else 0,
                # The library's file names count seconds: two starts within one would share a file.
                filename_suffix=f".{time.time_ns()}",
                flush_secs=_EVENT_SECONDS,
            )

    def write(self, step: int, values: Mapping[str, float], kind: str = "train") -> None:
        """Appends one record of numbers or zero-dimensional arrays; kind is one of KINDS."""
        if kind not in KINDS:
            raise ValueError(f"kind {kind!r} of a record must be one of {', '.join(KINDS)}.")
        values = {name: _number(name, value) for name, value in values.items()}
        record = {"step": int(step), "kind": kind}
        record |= {name: _to_json(value) for name, value in values.items()}
        if _identity(record) in self._known:
            return
        self._file.write(json.dumps(record, allow_nan=False) + "\n")
        self._file.flush()
        if self._events is not None:
            for name, value in values.items():
                self._events.add_scalar(f"{kind}/{name}", value, int(step))

    def sync(self) -> None:
        """Returns once metrics.jsonl is on the disk, so that a checkpoint may follow.

        TensorBoard's events go through a thread of their own and follow within seconds.
        """
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes both files; a second call does nothing."""
        if not self._file.closed:
            self.sync()
            self._file.close()
            if self._events is not None:
                self._events.close()

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *exception) -> None:
        self.close()


class Silent:
    """A writer for the processes of a run that leave writing to process 0."""

    def write(self, step: int, values: Mapping[str, float], kind: str = "train") -> None:
        """Nothing."""

    def sync(self) -> None:
        """Nothing."""

    def __enter__(self) -> "Silent":
        return self

    def __exit__(self, *exception) -> None:
        pass


def read_metrics(folder: str | os.PathLike, kind: str | None = None) -> list[dict]:
    """The records of a run folder in file order, of one kind or all; [] if there is no file yet.

    A last line without its line end is still being written, or was cut off by a crash: it is left
    out. Any other line that is not a record is an error.
    """
    path = pathlib.Path(folder) / FILE_NAME
    if not path.exists():
        return []
    records = [record for _, record in _read_lines(path)]
    return [record for record in records if kind is None or record["kind"] == kind]


def _read_lines(path: pathlib.Path) -> list[tuple[bytes, dict]]:
    """Every complete line, as bytes and as a record."""
    lines = path.read_bytes().split(b"\n")[:-1]
    return [(line + b"\n", _parse(path, index + 1, line)) for index, line in enumerate(lines)]


def _parse(path: pathlib.Path, number: int, line: bytes) -> dict:
    try:
        record = json.loads(line)
        if not (isinstance(record["step"], int) and isinstance(record["kind"], str)):
            raise TypeError
    except (ValueError, KeyError, TypeError):
        raise ValueError(
            f"{path}, line {number}: {line[:60]!r} is not a metrics record; repair or delete it."
        ) from None
    kind = record.pop("kind")
    values = {
        name: _SPECIAL.get(value, value) if isinstance(value, str) else value
        for name, value in record.items()
    }
    return {"step": values.pop("step"), "kind": kind, **values}


def _cut_back(path: pathlib.Path, start_step: int) -> list[dict]:
    """Drops what `start_step` did not see yet, keeps the rest byte for byte, and returns it."""
    if start_step < 0:
        raise ValueError(f"start_step {start_step} must be 0 or the step of a checkpoint.")
    if not path.exists():
        return []
    lines = _read_lines(path) if start_step else []
    lines = [(line, record) for line, record in lines if record["step"] <= start_step]
    records, kept = [record for _, record in lines], b"".join(line for line, _ in lines)
    if kept == path.read_bytes():
        return records
    temporary = path.with_suffix(".jsonl.tmp")
    with open(temporary, "wb") as file:
        file.write(kept)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    logging.info("%s: cut back to step %d.", path, start_step)
    return records


def _identity(record: Mapping) -> str:
    """What two records share if they differ only by the clock."""
    return str({name: _to_json(v) for name, v in record.items() if not name.startswith("time/")})


def _number(name: str, value: object) -> int | float:
    """A Python number from anything with one element; integers stay exact."""
    if name in ("step", "kind"):
        raise ValueError(f"a metric cannot be called {name!r}: records have that field; rename it.")
    array = np.asarray(value)
    if array.size != 1 or array.dtype.kind in "OSUcM":
        raise ValueError(f"metric {name!r} is {value!r}; only single real numbers are written.")
    return int(array.item()) if array.dtype.kind in "iub" else float(array.item())


def _to_json(value: int | float | str) -> int | float | str:
    if isinstance(value, int | str) or math.isfinite(value):
        return value
    return next(text for text, special in _SPECIAL.items() if str(special) == str(value))
