"""A run's folder: its config, and the guard against two runs in one place.

config.json  checkpoints/  metrics.jsonl  tensorboard/  samples/  summary.json  report.html
"""

import contextlib
import json
import pathlib
from collections.abc import Iterator

import filelock

from effarch import config as config_lib

CONFIG, SUMMARY, CHECKPOINTS, SAMPLES = "config.json", "summary.json", "checkpoints", "samples"


def create(folder: pathlib.Path, config, *, data: str | None) -> None:
    """Makes the folder, or recognizes it as this run's.

    `data` is the fingerprint of the prepared data, None for a model that has seen none yet. Raises
    ValueError if the folder belongs to another config, was trained on other data, or cannot be written.
    """
    mark = config_lib.fingerprint(config)
    path = folder / CONFIG
    if path.exists():
        saved = read_config(folder)
        if config_lib.fingerprint(saved) != mark:
            fields = config_lib.differences(saved, config)
            shown = "; ".join(
                f"{name}: {old!r} there, {new!r} here" for name, old, new in fields[:3]
            )
            more = f" and {len(fields) - 3} more" if len(fields) > 3 else ""
            raise ValueError(
                f"--workdir={folder} holds the run of another config ({shown}{more}); choose another "
                "--workdir, or restore those fields to resume it."
            )
        _check_data(path, data)
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        content = {"fingerprint": mark, "data": data}
        write_json(path, content | {"config": json.loads(config_lib.to_json(config))})
    except OSError as error:
        raise ValueError(
            f"--workdir={folder} cannot be written ({error.strerror}); choose a folder that can."
        ) from error


def _check_data(path: pathlib.Path, data: str | None) -> None:
    content = json.loads(path.read_text())
    saved = content.get("data")
    if saved is None and data is not None:  # converted, and now trained for the first time
        write_json(path, content | {"data": data})
    elif saved != data:
        raise ValueError(
            f"--workdir={path.parent} was trained on other data (its text or tokenizer changed since: "
            f"{str(saved)[:12]} there, {str(data)[:12]} now); restore the text, or choose another "
            "--workdir."
        )


def read_config(folder: pathlib.Path):
    """The config of the run in a folder, frozen; fields that came since have their defaults."""
    config = config_lib.from_json(json.dumps(_record(folder)["config"]))
    return config_lib.freeze(config_lib.completed(config))


def read_fingerprint(folder: pathlib.Path) -> str:
    """What the run's checkpoints are marked with: as the version that began it had it."""
    return _record(folder)["fingerprint"]


def _record(folder: pathlib.Path) -> dict:
    path = pathlib.Path(folder) / CONFIG
    if not path.is_file():
        raise ValueError(
            f"{folder} is not a run folder: it holds no {CONFIG}; give the folder of a run."
        )
    try:
        content = json.loads(path.read_text())
        _ = content["config"], content["fingerprint"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is damaged ({error}); restore it or start again in another --workdir."
        ) from error
    return content


def write_json(path: pathlib.Path, content: dict) -> None:
    """Writes through a temporary file, so that the file is whole or absent."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    temporary.replace(path)


class FolderInUse(ValueError):
    """Another process trains in the folder."""


@contextlib.contextmanager
def locked(folder: pathlib.Path) -> Iterator[None]:
    """Holds the folder for this process; the lock ends with the process, however it ends."""
    lock = filelock.FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise FolderInUse(
            f"--workdir={folder} is in use by another process; wait for it, or choose another."
        ) from None
    with lock:
        yield
