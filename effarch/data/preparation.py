"""Makes a prepared folder: tokens on disk, in the order of the sources.

FOLDER/meta.json            what was done, to what, with which result
FOLDER/tokenizer.json       absent for the tokenizer `bytes`
FOLDER/NAME/{train,val}.bin token ids, flat, little-endian uint16 (uint32 beyond 65535 ids)
FOLDER/NAME/{train,val}.idx int64 positions of the document tokens in the .bin

A stream is [document token] t1 ... tn for every document, and one more document token at the end;
so the .idx of d documents holds d + 1 positions and every byte of text is somebody's target.

Documents are read, tokenised and written in batches: a corpus need not fit in memory. All is
written to a folder beside the target and renamed at the end: a preparation that was killed leaves
nothing at the target. Preparing twice gives identical files.
"""

import contextlib
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging

import effarch
from effarch.data import sources, tokenizers, yardsticks

FORMAT = 1  # of the folder; raised when a reader of the old one would go wrong
SPLITS = ("train", "val")
BPE_SAMPLE_BYTES = 64 * 2**20  # of training text, in equal parts from each source
_BATCH_CHARACTERS = 2**20  # tokenised and written at once
_SPLIT_RULE = "val if blake2b-64(UTF-8 text, big endian) mod 1000 < val_permille, else train"

# Called as progress(what is done, source name, documents so far, UTF-8 bytes so far).
Progress = Callable[[str, str, int, int], None]


def prepare(
    folder: str | os.PathLike,
    chosen: Sequence[sources.Source],
    tokenizer: str,
    *,
    val_permille: int = 20,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Writes the prepared folder and returns its meta.json; `folder` must not exist or be empty."""
    check(tokenizer, val_permille)
    folder = Path(folder).expanduser().absolute()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(
            f"out: {folder} exists and is not an empty folder: remove it or name another."
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.parent / f".{folder.name}.partial-{os.getpid()}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        meta = _write(partial, chosen, tokenizer, val_permille, progress or (lambda *_: None))
        os.replace(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return meta


def check(tokenizer: str, val_permille: int) -> None:
    """Refuses arguments that could not work, before anything is read."""
    if not 0 <= val_permille < 1000:
        raise ValueError(
            f"val_permille is {val_permille}: give the documents in a thousand that go to "
            "validation, 0 to 999."
        )
    tokenizers.check(tokenizer)


def training_sample(
    chosen: Sequence[sources.Source], val_permille: int, limit: int = BPE_SAMPLE_BYTES
) -> Iterator[str]:
    """The first `limit` bytes of training documents, in equal parts from each source."""
    for source in chosen:
        left = limit // len(chosen)
        for text in source.documents():
            if left <= 0:
                break
            if not sources.is_validation(text, val_permille):
                left -= len(text.encode("utf-8"))
                yield text


def _write(
    folder: Path,
    chosen: Sequence[sources.Source],
    tokenizer_spec: str,
    val_permille: int,
    progress: Progress,
) -> dict[str, Any]:
    def sample() -> Iterator[str]:
        progress("training the tokenizer", "", 0, 0)
        return training_sample(chosen, val_permille)

    tokenizer = tokenizers.build(tokenizer_spec, sample)
    if tokenizer.to_json() is not None:
        (folder / "tokenizer.json").write_text(tokenizer.to_json(), encoding="utf-8")
    described, val_texts = {}, []
    for source in chosen:
        described[source.name], val_text = _write_source(
            folder / source.name, source, tokenizer, val_permille, progress
        )
        progress("measuring", source.name, 0, len(val_text))
        described[source.name]["yardsticks"] = yardsticks.measure(val_text)
        val_texts.append(val_text)
    alone = len(val_texts) == 1 and described[chosen[0].name]["yardsticks"]
    meta = {
        "format": FORMAT,
        "effarch": effarch.__version__,
        "tokenizer": {
            "spec": tokenizer.spec,
            "sha256": tokenizer.sha256,
            "true_size": tokenizer.true_size,
        },
        "vocab_size": tokenizer.vocab_size,
        "document_token": tokenizer.document_token,
        "dtype": tokenizer.dtype.name,
        "split": {"val_permille": val_permille, "rule": _SPLIT_RULE},
        "sources": described,
        "yardsticks": alone or yardsticks.measure(b"".join(val_texts)),
    }
    (folder / "meta.json").write_text(json.dumps(meta, indent=1) + "\n", encoding="utf-8")
    return meta


def _write_source(
    folder: Path,
    source: sources.Source,
    tokenizer: tokenizers.Tokenizer,
    val_permille: int,
    progress: Progress,
) -> tuple[dict[str, Any], bytes]:
    """Both streams of one source; returns its part of meta.json and the beginning of val's text."""
    folder.mkdir()
    val_text = bytearray()
    documents = num_bytes = 0
    last_report = 0.0
    with contextlib.ExitStack() as stack:
        streams = {
            split: stack.enter_context(StreamWriter(folder, split, tokenizer)) for split in SPLITS
        }
        for batch in _batches(source.documents()):
            for text, ids in zip(batch, tokenizer.encode_batch(batch)):
                is_val = sources.is_validation(text, val_permille)
                raw = text.encode("utf-8")
                streams["val" if is_val else "train"].add(ids, len(raw))
                if is_val and len(val_text) < yardsticks.MAX_BYTES:
                    val_text += raw
                documents, num_bytes = documents + 1, num_bytes + len(raw)
            if time.monotonic() - last_report > 0.1:
                progress("writing tokens", source.name, documents, num_bytes)
                last_report = time.monotonic()
    progress("writing tokens", source.name, documents, num_bytes)
    counts = {split: stream.counts() for split, stream in streams.items()}
    _check_counts(source, counts, val_permille)
    described = {"spec": source.spec, "manifest": source.manifest(), **counts}
    return described, bytes(val_text[: yardsticks.MAX_BYTES])


def _check_counts(source: sources.Source, counts: dict[str, Any], val_permille: int) -> None:
    train, val = counts["train"]["docs"], counts["val"]["docs"]
    if train + val == 0:
        raise ValueError(f"sources: {source.spec!r} holds no text: name a source with documents.")
    if train == 0:
        raise ValueError(
            f"sources: all {val} document(s) of {source.spec!r} fell into validation "
            f"(val_permille {val_permille}), so nothing is left to train on: give more documents "
            "or lower val_permille."
        )
    if val == 0 and val_permille > 0:
        logging.warning(
            "None of the %d document(s) of %r fell into validation (val_permille %d): for a "
            "validation loss give more documents or raise val_permille.",
            train,
            source.spec,
            val_permille,
        )


def _batches(texts: Iterator[str]) -> Iterator[list[str]]:
    """Lists of documents of about `_BATCH_CHARACTERS` together; a longer document stands alone."""
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


class StreamWriter:
    """NAME.bin and NAME.idx of one split; a context manager that writes the last document token."""

    def __init__(self, folder: Path, split: str, tokenizer: tokenizers.Tokenizer):
        self._tokenizer = tokenizer
        self._bin = open(folder / f"{split}.bin", "wb")  # noqa: SIM115 closed by __exit__
        self._idx = open(folder / f"{split}.idx", "wb")  # noqa: SIM115
        self._sha256 = hashlib.sha256()
        self._docs = self._tokens = self._bytes = 0

    def __enter__(self) -> "StreamWriter":
        return self

    def add(self, ids: np.ndarray, num_bytes: int) -> None:
        """Appends one document: its document token, then its ids."""
        if (ids == self._tokenizer.document_token).any():
            raise ValueError(
                f"tokenizer: {self._tokenizer.spec!r} encodes text of a document as its document "
                f"token {self._tokenizer.document_token}: name another with '#TOKEN'."
            )
        self._begin_document()
        self._append(ids)
        self._docs += 1
        self._bytes += num_bytes

    def __exit__(self, *_: Any) -> None:
        self._begin_document()
        self._bin.close()
        self._idx.close()

    def counts(self) -> dict[str, Any]:
        """This split's part of meta.json."""
        return {
            "docs": self._docs,
            "tokens": self._tokens,
            "bytes": self._bytes,
            "sha256": self._sha256.hexdigest(),
        }

    def _begin_document(self) -> None:
        self._idx.write(np.asarray(self._tokens, "<i8").tobytes())
        self._append(np.asarray([self._tokenizer.document_token]))

    def _append(self, ids: np.ndarray) -> None:
        data = ids.astype(self._tokenizer.dtype).tobytes()
        self._bin.write(data)
        self._sha256.update(data)
        self._tokens += len(ids)
