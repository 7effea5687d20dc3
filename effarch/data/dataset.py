"""Opens prepared folders, and makes small ones on first use."""

import contextlib
import functools
import hashlib
import itertools
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import tokenizers as hf
from absl import logging

from effarch.data import preparation, tokenizers
from effarch.data import sources as sources_lib


class Dataset:
    """A prepared folder, memory-mapped."""

    metrics = ("bits_per_byte",)
    """What an evaluation reports beside the loss."""

    def __init__(self, folder: Path, meta: dict[str, Any], tokenizer: tokenizers.Tokenizer):
        self.folder = folder
        self.meta = meta
        self.tokenizer = tokenizer
        self.vocab_size: int = meta["vocab_size"]
        self.num_words = tokenizer.true_size
        self.document_token: int = meta["document_token"]
        self.sources: tuple[str, ...] = tuple(meta["sources"])

    def __repr__(self) -> str:
        return f"Dataset({str(self.folder)!r}, sources={self.sources}, vocab={self.vocab_size})"

    @property
    def description(self) -> str:
        """`stdlib; tokenizer bpe:4096`."""
        return f"{', '.join(self.sources)}; tokenizer {self.tokenizer.spec}"

    @property
    def yardsticks(self) -> dict[str, float]:
        """What general compressors make of the validation text, in bits per byte."""
        return self.meta["yardsticks"]

    @functools.cached_property
    def fingerprint(self) -> str:
        """sha256 of meta.json's content, which holds the hashes of all streams."""
        return hashlib.sha256(json.dumps(self.meta, sort_keys=True).encode()).hexdigest()

    @functools.cache  # noqa: B019 a run holds a dataset or two, to its end
    def tokens(self, source: str, split: str) -> np.ndarray:
        """The token stream of a source: [tokens] uint16 or uint32, read-only, mapped."""
        dtype = np.dtype(self.meta["dtype"]).newbyteorder("<")
        return np.memmap(self.folder / source / f"{split}.bin", dtype, mode="r")

    @functools.cache  # noqa: B019
    def offsets(self, source: str, split: str) -> np.ndarray:
        """Positions of the document tokens in the stream: [documents + 1] int64, mapped."""
        return np.memmap(self.folder / source / f"{split}.idx", "<i8", mode="r")

    def count(self, source: str, split: str, what: str = "tokens") -> int:
        """`docs`, `tokens` or UTF-8 `bytes` of one stream."""
        return self.meta["sources"][source][split][what]

    def documents(self, source: str, split: str) -> Iterator[np.ndarray]:
        """The token ids of each document, without document tokens."""
        tokens, offsets = self.tokens(source, split), self.offsets(source, split)
        for start, stop in itertools.pairwise(offsets):
            yield tokens[start + 1 : stop]


def open_dataset(folder: str | os.PathLike) -> Dataset:
    """The dataset in a prepared folder; refuses one that is incomplete or was changed."""
    folder = Path(folder).expanduser()
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(
            f"data: {folder} is not a prepared folder (no meta.json): make one with `python -m "
            f"effarch.prepare_data --source=embedded:stdlib --tokenizer=bpe:4096 "
            f"--out={shlex.quote(str(folder))}`."
        ) from None
    except json.JSONDecodeError as error:
        raise ValueError(
            f"data: {folder / 'meta.json'} is damaged ({error}): delete the folder and "
            "prepare it again."
        ) from None
    if meta.get("format") != preparation.FORMAT:
        raise ValueError(
            f"data: {folder} has format {meta.get('format')!r} and this version of effarch reads "
            f"{preparation.FORMAT}: delete the folder and prepare it again."
        )
    tokenizer = _load_tokenizer(folder, meta)
    for source, described in meta["sources"].items():
        for split in preparation.SPLITS:
            counts, stem = described[split], folder / source / split
            _check_size(stem.with_suffix(".bin"), counts["tokens"] * tokenizer.dtype.itemsize)
            _check_size(stem.with_suffix(".idx"), (counts["docs"] + 1) * 8)
    return Dataset(folder, meta, tokenizer)


def find_or_prepare(
    sources: Sequence[str],
    tokenizer: str,
    val_permille: int = 20,
    *,
    path: str = "",
    cache_dir: str = "",
) -> Dataset:
    """The dataset at `path` if one is given, else the one in the cache, prepared on first use.

    The cache folder is `cache_dir`, else $XDG_CACHE_HOME/effarch, else ~/.cache/effarch. The name
    of an entry hashes all that decides its content: the sources' files (or Python and package
    versions), the tokenizer and the split. Processes that start together prepare it once.
    """
    if path:
        return open_dataset(path)
    for spec in sources:
        if spec.startswith("hf:"):
            raise ValueError(
                f"data.sources: {spec!r} is read in preparation only: run `python -m "
                f"effarch.prepare_data --source={spec} --tokenizer={tokenizer} --out=FOLDER` and "
                "set data.path to FOLDER."
            )
    preparation.check(tokenizer, val_permille)
    chosen = sources_lib.resolve(sources)
    cache = _cache_folder(cache_dir)
    cache.mkdir(parents=True, exist_ok=True)
    key = _content_key(chosen, tokenizer, val_permille)
    folder = cache / key
    with filelock.FileLock(cache / f"{key}.lock"):
        if not (folder / "meta.json").is_file():
            for leftover in cache.glob(f".{key}.partial-*"):  # of processes that were killed
                shutil.rmtree(leftover, ignore_errors=True)
            logging.info("Preparing %s with %s in %s", list(sources), tokenizer, folder)
            if tokenizer == "bytes":
                preparation.prepare(folder, chosen, tokenizer, val_permille=val_permille)
            else:
                _prepare_apart(folder, sources, tokenizer, val_permille)
    return open_dataset(folder)


def _prepare_apart(folder: Path, sources: Sequence[str], tokenizer: str, val_permille: int) -> None:
    """`effarch.prepare_data` in a process of its own.

    A training process on a CPU has one arena of memory (effarch/training/freed_memory.py), for which
    the threads of a tokenizer would queue: the quickstart's text took 34 s there and takes 11 s here.
    """
    command = [sys.executable, "-m", "effarch.prepare_data", f"--out={folder}"]
    command += [f"--source={spec}" for spec in sources]
    command += [f"--tokenizer={tokenizer}", f"--val_permille={val_permille}"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    if done.returncode:
        _, mark, sentence = done.stderr.rpartition("prepare_data: ")
        kind = ValueError if mark else RuntimeError
        raise kind(" ".join((sentence or done.stderr).split()))


def _cache_folder(cache_dir: str) -> Path:
    if cache_dir:
        return Path(cache_dir).expanduser()
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(home).expanduser() / "effarch"


def _content_key(chosen: Sequence[sources_lib.Source], tokenizer: str, val_permille: int) -> str:
    content = {
        "format": preparation.FORMAT,
        "sources": [[source.name, source.spec, source.manifest()] for source in chosen],
        "tokenizer": [tokenizer, tokenizers.check(tokenizer), hf.__version__],
        "val_permille": val_permille,
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]


def _load_tokenizer(folder: Path, meta: dict[str, Any]) -> tokenizers.Tokenizer:
    described = meta["tokenizer"]
    text = None
    if described["spec"] != "bytes":
        file = folder / "tokenizer.json"
        text = file.read_text(encoding="utf-8") if file.is_file() else ""
        if hashlib.sha256(text.encode("utf-8")).hexdigest() != described["sha256"]:
            raise ValueError(
                f"data: {file} is missing or is not the tokenizer that made this folder "
                f"(sha256 {described['sha256'][:12]}... expected): delete the folder and "
                "prepare it again."
            )
    return tokenizers.load(described["spec"], text, meta["document_token"])


def _check_size(file: Path, expected: int) -> None:
    size = None
    with contextlib.suppress(FileNotFoundError):
        size = file.stat().st_size
    if size != expected:
        held = "is missing" if size is None else f"holds {size} bytes"
        raise ValueError(
            f"data: {file} {held} and meta.json says {expected} bytes: it was cut short or "
            "changed; delete the folder and prepare it again."
        )
