"""Datasets of the Hugging Face hub as a corpus: `hf:REPO[:CONFIG]`, streamed.

Only preparation reads them: a training run never waits for a network.
"""

import importlib.util
from collections.abc import Iterator
from typing import Any

from effarch.data.corpus import Corpus


def corpus(name: str) -> Corpus:
    """The `train` split of a hub dataset with a `text` column, in its own order."""
    repository, _, config = name.partition(":")
    if importlib.util.find_spec("datasets") is None:
        raise ValueError(
            f"sources: 'hf:{name}' needs the package datasets, which is not installed: run "
            "`pip install datasets`, or use files:GLOB on files that you have."
        )

    def documents() -> Iterator[str]:
        import datasets

        rows = datasets.load_dataset(repository, config or None, split="train", streaming=True)
        for number, row in enumerate(rows):
            if not isinstance(row.get("text"), str):
                raise ValueError(
                    f"sources: row {number} of 'hf:{name}' has no 'text' string (it holds "
                    f"{sorted(row)}): choose a dataset or config with a 'text' column."
                )
            yield row["text"]

    def manifest() -> dict[str, Any]:
        import datasets

        return {
            "repository": repository,
            "config": config,
            "split": "train",
            "datasets": datasets.__version__,
        }

    return Corpus(documents, manifest)
