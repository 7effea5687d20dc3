"""A checkpoint's manifest: the size and SHA-256 of every file, what they hold and whose they are.

Orbax restores a flipped byte, a changed dtype and another config's equal shapes without a word, so
each checkpoint folder gets a `manifest.json`, written last. A folder without one is an unfinished
save; a folder whose files disagree with it is damaged. The manifest holds a hash of itself.
"""

import hashlib
import json
import os
import pathlib
from typing import Any

FILE_NAME = "manifest.json"
_FORMAT = 1


class Damaged(Exception):
    """A file of a checkpoint is not what its manifest says; the message names it."""


def write(folder: pathlib.Path, *, step: int, fingerprint: str, leaves: dict[str, str]) -> None:
    """Hashes every file below `folder`, makes them durable, then writes the manifest atomically."""
    import effarch

    files = {}
    (folder / FILE_NAME).unlink(missing_ok=True)
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        size, digest = _hash(path, durable=True)
        files[path.relative_to(folder).as_posix()] = {"size": size, "sha256": digest}
    for directory in [folder, *(p for p in folder.rglob("*") if p.is_dir())]:
        _sync_directory(directory)
    content = {
        "format": _FORMAT,
        "effarch": effarch.__version__,
        "step": step,
        "fingerprint": fingerprint,
        "leaves": leaves,
        "files": files,
    }
    temporary = folder / f"{FILE_NAME}.tmp"
    with open(temporary, "w", encoding="utf-8") as file:
        json.dump({**content, "sha256": _self_hash(content)}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, folder / FILE_NAME)
    _sync_directory(folder)
    _sync_directory(folder.parent)


def exists(folder: pathlib.Path) -> bool:
    """Whether the save into this folder was finished."""
    return (folder / FILE_NAME).is_file()


def read(folder: pathlib.Path) -> dict[str, Any]:
    """The manifest's content. Damaged: it cannot be read or was changed."""
    try:
        content = json.loads((folder / FILE_NAME).read_bytes())
        digest = content.pop("sha256")
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise Damaged(f"{FILE_NAME} cannot be read ({error})") from error
    if digest != _self_hash(content):
        raise Damaged(f"{FILE_NAME} was changed after it was written")
    if content.get("format") != _FORMAT:
        raise Damaged(
            f"{FILE_NAME} has format {content.get('format')!r}, this version of effarch reads "
            f"{_FORMAT}"
        )
    return content


def verify(folder: pathlib.Path, content: dict[str, Any]) -> None:
    """Compares every file with the manifest. Damaged: the first that is missing or differs."""
    for name, wanted in content["files"].items():
        path = folder / name
        try:
            size = path.stat().st_size
            if size != wanted["size"]:
                raise Damaged(f"{name} has {size} bytes instead of {wanted['size']}")
            if _hash(path)[1] != wanted["sha256"]:
                raise Damaged(f"{name} has changed bytes (its SHA-256 differs)")
        except OSError as error:
            raise Damaged(f"{name} cannot be read ({error.strerror})") from error


def _hash(path: pathlib.Path, *, durable: bool = False) -> tuple[int, str]:
    with open(path, "rb") as file:
        if durable:
            os.fsync(file.fileno())
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return file.tell(), digest


def _self_hash(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _sync_directory(path: pathlib.Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
