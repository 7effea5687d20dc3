"""Checkpoints of a run: written by orbax in the background, proved by a manifest.

    <folder>/200/state/...        arrays (orbax), see named_arrays.py
    <folder>/200/record/...       the caller's JSON dict
    <folder>/200/manifest.json    hashes of the above, written last: see manifest.py

An older checkpoint is deleted only after a newer one has its manifest (orbax's own `max_to_keep`
deletes right after the commit, before we could hash, so it is not used). Folders are local or
shared disks; with several processes `save`, `restore` and `wait` are collective, and process 0
hashes, chooses and deletes.
"""

import functools
import json
import logging as std_logging
import os
import pathlib
import shutil
import threading
from typing import Any

import jax
from absl import logging

from effarch.parallel import multihost
from effarch.training import manifest, named_arrays

_NUM_LISTED = 10


class CheckpointMismatch(ValueError):
    """A sound checkpoint of another run: its fingerprint or its arrays differ from the target's."""


class CheckpointFailed(RuntimeError):
    """A save did not reach the disk. The run should end; the last complete checkpoint is intact."""


class Checkpoints:
    """The checkpoints of one run, in `folder`.

    Args:
      folder: made on the first save; local or shared by all processes.
      fingerprint: the hash of the run's config; restoring another one's checkpoint is refused.
      keep: number of newest checkpoints to keep, at least 1.
      keep_period: steps divisible by it are kept for good (never step 0); 0 keeps none.
      asynchronous: False makes `save` return only after the manifest is on disk.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        *,
        fingerprint: str,
        keep: int = 2,
        keep_period: int = 0,
        asynchronous: bool = True,
    ):
        if "://" in str(folder):
            raise ValueError(
                f"checkpoint folder {folder} is not a path; mount the bucket and give its path"
            )
        if keep < 1 or keep_period < 0:
            raise ValueError(
                f"keep={keep}, keep_period={keep_period}: keep at least 1 checkpoint, and use "
                "keep_period=0 to keep none for good"
            )
        self.folder = pathlib.Path(folder).expanduser().absolute()
        self.fingerprint = fingerprint
        self.keep = keep
        self.keep_period = keep_period
        self.asynchronous = asynchronous
        self._last: int | None = None  # the step this object saved or restored last
        self._thread: threading.Thread | None = None
        self._failed: tuple[int, BaseException] | None = None  # the step and why

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind, value, traceback) -> None:
        try:
            self.close()
        except CheckpointFailed:
            if value is None:
                raise

    def check_writable(self) -> None:
        """Makes the folder and writes a file there. PermissionError: that is not possible."""
        probe = self.folder / f".writable-{os.getpid()}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            probe.write_bytes(b"0")
            probe.unlink()
        except OSError as error:
            raise PermissionError(
                f"checkpoints cannot be written to {self.folder} ({error.strerror}); choose "
                "another --workdir"
            ) from error

    def steps(self) -> list[int]:
        """The complete checkpoints (those with a manifest), newest last."""
        return sorted(int(p.name) for p in self._step_folders() if manifest.exists(p))

    def save(self, step: int, state: Any, record: dict) -> None:
        """Starts to save; the state may be donated as soon as this returns.

        Waits for the save before it. The step this object saved or restored last is not written
        again. Steps on disk that are newer than that one (damaged, or given up by restoring an
        older step) are no part of this run: they go once this save is complete.

        Raises:
          ValueError: the step does not grow; a leaf or the record cannot be stored; the folder
            holds this or later steps and was not restored from.
          CheckpointFailed: this save or the one before it did not reach the disk.
        """
        self.wait()
        if step == self._last:
            return
        self._check_step(step)
        leaves = named_arrays.describe(state)
        storable = named_arrays.to_storable(state)
        _check_record(record)
        multihost.barrier("effarch checkpoint checked")
        try:
            if jax.process_index() == 0:
                self._make_room(step)
            self._orbax.save(self._path(step), args=_save_args(storable, record))
        except Exception as error:
            self._failed = (step, error)
        self._raise_if_failed()
        before = step if self._last is None else self._last
        self._last = step
        self._thread = threading.Thread(
            target=self._finish, args=(step, before, leaves), name=f"checkpoint {step}"
        )
        self._thread.start()
        if not self.asynchronous:
            self.wait()

    def restore(self, target: Any, *, step: int | None = None) -> tuple[int, Any, dict] | None:
        """(step, state, record) of the newest sound checkpoint, or None if the folder has none.

        `target` is a tree of ShapeDtypeStructs or arrays: it gives containers, shapes, dtypes and
        shardings (the first local device where a struct has none). A damaged checkpoint is passed
        over with one warning; an unfinished one with a log line. `step` takes exactly that one.

        Raises:
          CheckpointMismatch: another fingerprint, or other leaves; no array was read.
          ValueError: `step` is not there; or there are checkpoints and all of them are damaged.
        """
        self.wait()
        wanted = named_arrays.describe(target)
        chosen = multihost.on_first(lambda: self._choose(wanted, step))
        if chosen is None:
            return None
        found = self._orbax.restore(self._path(chosen), args=_restore_args(target))
        self._last = chosen
        return chosen, named_arrays.from_stored(found["state"], target), found["record"]

    def wait(self) -> None:
        """Returns once the last save is complete. CheckpointFailed: it is not, and never will."""
        self._join()
        self._raise_if_failed()
        multihost.barrier("effarch checkpoint complete")

    def close(self) -> None:
        """Waits for the last save and ends orbax's threads. CheckpointFailed: see `wait`."""
        self._join()
        if "_orbax" in self.__dict__:
            self.__dict__.pop("_orbax").close()
        self._raise_if_failed()

    # Writing.

    @functools.cached_property
    def _orbax(self):
        """The async checkpointer; orbax takes 0.4 s to import, so only when it is needed."""
        import orbax.checkpoint as ocp

        _quiet(os.path.dirname(ocp.__file__))
        handler = ocp.CompositeCheckpointHandler(
            state=ocp.StandardCheckpointHandler(), record=ocp.JsonCheckpointHandler()
        )
        return ocp.AsyncCheckpointer(handler)

    def _check_step(self, step: int) -> None:
        if self._last is not None and step < self._last:
            raise ValueError(
                f"checkpoint step {step} is older than step {self._last}, the last one of this run"
            )
        newest = max(self.steps(), default=-1)
        if self._last is None and newest >= step:
            raise ValueError(
                f"{self.folder} already holds step {newest}, and step {step} would replace it; "
                "restore from the folder first, or choose another --workdir"
            )

    def _make_room(self, step: int) -> None:
        """Clears what an interrupted save of this step left; a complete one is set aside."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for path in self.folder.glob(f"{step}.orbax-checkpoint-tmp*"):
            shutil.rmtree(path)
        path = self._path(step)
        if manifest.exists(path):
            aside = self.folder / f"replaced-{step}"
            if aside.exists():
                shutil.rmtree(aside)
            path.rename(aside)
        elif path.exists():
            shutil.rmtree(path)

    def _finish(self, step: int, before: int, leaves: dict[str, str]) -> None:
        """Runs in the background: orbax's commit, then the manifest, then old steps go."""
        try:
            self._orbax.wait_until_finished()
            if jax.process_index() == 0:
                manifest.write(
                    self._path(step), step=step, fingerprint=self.fingerprint, leaves=leaves
                )
                self._delete_old(step, before)
        except BaseException as error:
            self._failed = (step, error)

    def _delete_old(self, newest: int, before: int) -> None:
        """Keeps what the policy says of this run's steps: `newest` and those up to `before`."""
        steps = [step for step in self.steps() if step <= before or step == newest]
        kept = set(steps[-self.keep :])
        if self.keep_period:
            kept |= {step for step in steps if step > 0 and step % self.keep_period == 0}
        for path in self._step_folders():
            if int(path.name) not in kept:
                # The manifest goes first: a half-deleted checkpoint is then an unfinished one.
                (path / manifest.FILE_NAME).unlink(missing_ok=True)
                shutil.rmtree(path)
        for pattern in ("replaced-*", "*.orbax-checkpoint-tmp*"):
            for path in self.folder.glob(pattern):
                shutil.rmtree(path)

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _raise_if_failed(self) -> None:
        if self._failed is None:
            return
        step, error = self._failed
        complete = [s for s in self.steps() if s != step]
        last = f"step {complete[-1]} is the last complete one" if complete else "there is none yet"
        why = " ".join([type(error).__name__ + ":", *str(error).strip().splitlines()[:1]])
        raise CheckpointFailed(
            f"saving checkpoint {step} to {self.folder} failed ({why}); {last}"
        ) from error

    # Reading.

    def _choose(self, wanted: dict[str, str], step: int | None) -> int | None:
        """The newest step (or `step`) that is complete, ours, fits `wanted` and is undamaged."""
        candidates = self._candidates(step)
        num_damaged = 0
        for candidate in candidates:
            try:
                content = manifest.read(self._path(candidate))
                self._check_match(candidate, content, wanted)
                manifest.verify(self._path(candidate), content)
                return candidate
            except manifest.Damaged as damage:
                num_damaged += 1
                if step is not None:
                    raise ValueError(
                        f"checkpoint {step} in {self.folder} is damaged: {damage}; "
                        "restore without a step to take the newest sound one"
                    ) from damage
                logging.warning(
                    "checkpoint %d in %s is damaged: %s; trying the one before",
                    candidate,
                    self.folder,
                    damage,
                )
        if num_damaged:
            raise ValueError(
                f"all {num_damaged} checkpoints in {self.folder} are damaged (steps "
                f"{', '.join(map(str, reversed(candidates)))}); restore the files from a copy, or "
                "choose another --workdir to start over"
            )
        return None

    def _candidates(self, step: int | None) -> list[int]:
        """Complete steps, newest first; says which unfinished ones are passed over."""
        complete = self.steps()
        if step is not None:
            if step not in complete:
                steps = ", ".join(map(str, complete)) or "none"
                raise ValueError(f"{self.folder} has no checkpoint of step {step}; it has {steps}")
            return [step]
        for path in self._step_folders():
            if not manifest.exists(path):
                logging.warning(
                    "checkpoint %s in %s has no manifest (an unfinished save) and is passed over",
                    path.name,
                    self.folder,
                )
        return complete[::-1]

    def _check_match(self, step: int, content: dict[str, Any], wanted: dict[str, str]) -> None:
        if content["fingerprint"] != self.fingerprint:
            raise CheckpointMismatch(
                f"{self.folder} belongs to the config with fingerprint {content['fingerprint']}, "
                f"not to {self.fingerprint}; choose another --workdir, or run the original config"
            )
        lines = named_arrays.differences(content["leaves"], wanted)
        if lines:
            more = len(lines) - _NUM_LISTED
            tail = [f"and {more} more"] if more > 0 else []
            listed = "\n  ".join(lines[:_NUM_LISTED] + tail)
            raise CheckpointMismatch(
                f"checkpoint {step} in {self.folder} has other arrays than this run; choose "
                f"another --workdir, or run the original config:\n  {listed}"
            )

    def _path(self, step: int) -> pathlib.Path:
        return self.folder / str(step)

    def _step_folders(self) -> list[pathlib.Path]:
        if not self.folder.is_dir():
            return []
        folders = [p for p in self.folder.iterdir() if p.name.isdecimal() and p.is_dir()]
        return sorted(folders, key=lambda path: int(path.name))


def _save_args(storable: dict, record: dict):
    import orbax.checkpoint as ocp

    return ocp.args.Composite(
        state=ocp.args.StandardSave(storable), record=ocp.args.JsonSave(record)
    )


def _restore_args(target: Any):
    import orbax.checkpoint as ocp

    request = named_arrays.to_request(target)
    return ocp.args.Composite(
        state=ocp.args.StandardRestore(request), record=ocp.args.JsonRestore()
    )


def _check_record(record: dict) -> None:
    try:
        json.dumps(record)
    except (TypeError, ValueError) as error:
        raise ValueError(f"checkpoint record is not JSON: {error}") from error


@functools.cache
def _quiet(package: str) -> None:
    """Drops a package's records on absl's logger; its failures come back as exceptions."""
    std_logging.getLogger("absl").addFilter(lambda record: not record.pathname.startswith(package))
