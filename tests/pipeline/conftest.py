"""Small prepared folders that the tests of this folder share."""

import json

import numpy as np
import pytest

from effarch.data import dataset, preparation, sources

WORDS = ["the", "a", "cat", "dog", "sat", "on", "mat", "über", "Straße", "日本", "😀", "x", ";"]


def make_texts(seed: int, count: int, longest: int = 120) -> list[str]:
    """Distinct documents of random words, some with characters of two to four bytes."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, longest, count)
    return [f"{seed}-{i} " + " ".join(rng.choice(WORDS, n)) for i, n in enumerate(lengths)]


@pytest.fixture(scope="session")
def three_texts() -> dict[str, list[str]]:
    return {"one": make_texts(1, 300), "two": make_texts(2, 120), "three": make_texts(3, 40)}


@pytest.fixture(scope="session")
def three_files(tmp_path_factory, three_texts):
    """{name: files: spec} of three .jsonl files of unequal size."""
    folder = tmp_path_factory.mktemp("texts")
    specs = {}
    for name, texts in three_texts.items():
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        specs[name] = f"files:{path}"
    return specs


@pytest.fixture(scope="session")
def mixed(tmp_path_factory, three_files) -> dataset.Dataset:
    """Three sources, BPE of 400, a fifth for validation."""
    folder = tmp_path_factory.mktemp("prepared") / "mixed"
    chosen = sources.resolve(list(three_files.values()), names=list(three_files))
    preparation.prepare(folder, chosen, "bpe:400", val_permille=200)
    return dataset.open_dataset(folder)


@pytest.fixture
def prepare_texts(tmp_path):
    """Function: texts of one .jsonl file -> opened dataset with one source, `only`."""

    def prepare(texts, tokenizer="bytes", val_permille=0, name="only"):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        chosen = sources.resolve([f"files:{path}"], names=[name])
        folder = tmp_path / f"prepared-{name}"
        preparation.prepare(folder, chosen, tokenizer, val_permille=val_permille)
        return dataset.open_dataset(folder)

    return prepare
