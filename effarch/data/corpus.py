"""A corpus: documents in a fixed order, and what decides them."""

import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Two functions, so that naming a corpus reads nothing."""

    documents: Callable[[], Iterator[str]]  # the texts, the same order on every call
    manifest: Callable[[], dict[str, Any]]  # JSON: file hashes, versions


def file_sha256(path: Path) -> str:
    """sha256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def combined_sha256(named_paths: Iterable[tuple[str, Path]]) -> str:
    """One sha256 over (name, sha256 of the content) of many files, in the order given."""
    digest = hashlib.sha256()
    for name, path in named_paths:
        digest.update(f"{name}\0{file_sha256(path)}\n".encode())
    return digest.hexdigest()
