"""Text files as a corpus: `files:GLOB`, read in sorted order, never whole folders at once.

.jsonl: one document a line, key `text`. .parquet: one document a row, column `text`. Anything else
is UTF-8 text, one document a file; a text file of more than 256 kB is cut at blank lines into
documents of at least 16 kB, so that one long file can be split and need not fit in memory.
"""

import glob
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from effarch.data.corpus import Corpus, file_sha256

LONG_FILE_BYTES = 256 * 1024
PIECE_CHARACTERS = 16 * 1024
_LONGEST_PIECE_CHARACTERS = 256 * 1024  # where no blank line comes


def corpus(pattern: str) -> Corpus:
    """The files that match `pattern` (`**` descends into folders)."""
    paths = sorted(Path(name) for name in glob.glob(os.path.expanduser(pattern), recursive=True))
    paths = [path for path in paths if path.is_file()]
    if not paths:
        raise ValueError(
            f"sources: no file matches 'files:{pattern}' (looked from {Path.cwd()}): check the "
            "path, and quote the pattern so that the shell does not expand it."
        )
    return Corpus(lambda: _documents(pattern, paths), lambda: _manifest(paths))


def _manifest(paths: Sequence[Path]) -> dict[str, Any]:
    root = os.path.commonpath([path.absolute().parent for path in paths])
    return {
        "files": [
            {
                "name": Path(os.path.relpath(path, root)).as_posix(),
                "sha256": file_sha256(path),
                "bytes": path.stat().st_size,
            }
            for path in paths
        ]
    }


def _documents(pattern: str, paths: Sequence[Path]) -> Iterator[str]:
    readers = {".jsonl": _jsonl, ".parquet": _parquet}
    found = False
    for path in paths:
        for text in readers.get(path.suffix.lower(), _text)(path):
            found = found or bool(text.strip())
            yield text
    if not found:
        raise ValueError(
            f"sources: 'files:{pattern}' holds no text: {len(paths)} file(s) matched and all are "
            "empty; name files with text in them."
        )


def _text(path: Path) -> Iterator[str]:
    try:
        with open(path, encoding="utf-8", newline="") as file:
            if path.stat().st_size <= LONG_FILE_BYTES:
                yield file.read()
            else:
                yield from _pieces(file)
    except UnicodeDecodeError as error:
        raise _not_utf8(path, error) from None


def _pieces(lines: Iterator[str]) -> Iterator[str]:
    piece: list[str] = []
    size = 0
    for line in lines:
        piece.append(line)
        size += len(line)
        is_blank = not line.strip()
        if (is_blank and size >= PIECE_CHARACTERS) or size >= _LONGEST_PIECE_CHARACTERS:
            yield "".join(piece)
            piece, size = [], 0
    if piece:
        yield "".join(piece)


def _jsonl(path: Path) -> Iterator[str]:
    try:
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield _jsonl_text(path, number, line)
    except UnicodeDecodeError as error:
        raise _not_utf8(path, error) from None


def _jsonl_text(path: Path, number: int, line: str) -> str:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"sources: {path} line {number} is not JSON ({error.msg}): every line of a .jsonl file "
            "must be one object with a 'text' string."
        ) from None
    text = record.get("text") if isinstance(record, dict) else None
    if not isinstance(text, str):
        held = (
            f"keys {sorted(record)}" if isinstance(record, dict) else f"a {type(record).__name__}"
        )
        raise ValueError(
            f"sources: {path} line {number} has no 'text' string (it holds {held}): every line "
            "of a .jsonl file must be one object with a 'text' string."
        )
    return text


def _parquet(path: Path) -> Iterator[str]:
    try:
        from pyarrow import parquet
    except ImportError:
        raise ValueError(
            f"sources: {path} needs the package pyarrow, which is not installed: run "
            "`pip install pyarrow`, or give .jsonl files."
        ) from None
    table = parquet.ParquetFile(path)
    if "text" not in table.schema_arrow.names:
        raise ValueError(
            f"sources: {path} has no column 'text' (it holds {table.schema_arrow.names}): name "
            "the column of the documents 'text'."
        )
    for batch in table.iter_batches(batch_size=256, columns=["text"]):
        yield from (text for text in batch.column(0).to_pylist() if text is not None)


def _not_utf8(path: Path, error: UnicodeDecodeError) -> ValueError:
    return ValueError(
        f"sources: {path} is not UTF-8 text (byte {error.object[error.start]:#04x}): convert the "
        "file to UTF-8, or narrow the pattern to text files."
    )
