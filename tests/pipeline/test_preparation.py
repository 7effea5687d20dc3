import argparse
import hashlib
import json
import lzma
import os
import subprocess
import sys
import textwrap
import zlib
from pathlib import Path

import numpy as np
import pytest

from effarch.data import dataset, preparation, sources, tokenizers, yardsticks

TEXTS = [f"Document {i}: größe {i * i}\n" for i in range(40)]


@pytest.fixture
def texts_file(tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return f"files:{path}"


def goes_to_val(text, permille):
    return int(hashlib.blake2b(text.encode(), digest_size=8).hexdigest(), 16) % 1000 < permille


def read_all(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_streams_on_disk(tmp_path, texts_file):
    preparation.prepare(tmp_path / "out", sources.resolve([texts_file]), "bytes", val_permille=300)
    for split, is_val in (("val", True), ("train", False)):
        kept = [text.encode() for text in TEXTS if goes_to_val(text, 300) == is_val]
        stream, offsets = [], []
        for text in kept:
            offsets.append(len(stream))
            stream += [256, *text]
        offsets.append(len(stream))
        stream.append(256)
        folder = tmp_path / "out" / "files"
        assert np.fromfile(folder / f"{split}.bin", "<u2").tolist() == stream
        assert np.fromfile(folder / f"{split}.idx", "<i8").tolist() == offsets
        meta = json.loads((tmp_path / "out" / "meta.json").read_text())
        assert meta["sources"]["files"][split] == {
            "docs": len(kept),
            "tokens": len(stream),
            "bytes": sum(map(len, kept)),
            "sha256": hashlib.sha256((folder / f"{split}.bin").read_bytes()).hexdigest(),
        }
    assert not (tmp_path / "out" / "tokenizer.json").exists()


def test_meta(tmp_path, texts_file):
    meta = preparation.prepare(
        tmp_path / "out", sources.resolve([texts_file]), "bpe:300", val_permille=300
    )
    assert meta == json.loads((tmp_path / "out" / "meta.json").read_text())
    text = (tmp_path / "out" / "tokenizer.json").read_bytes()
    assert meta["tokenizer"]["sha256"] == hashlib.sha256(text).hexdigest()
    assert meta["vocab_size"] == 320 and meta["document_token"] == 0
    path = texts_file.removeprefix("files:")
    [entry] = meta["sources"]["files"]["manifest"]["files"]
    assert entry["name"] == "texts.jsonl"
    assert entry["sha256"] == hashlib.sha256(Path(path).read_bytes()).hexdigest()
    assert meta["yardsticks"] == meta["sources"]["files"]["yardsticks"]


def test_preparing_twice_gives_identical_files(tmp_path, three_files):
    """In two processes, so that neither hash seeds nor threads decide anything."""
    program = textwrap.dedent(
        """
        import sys
        from effarch.data import preparation, sources
        preparation.prepare(sys.argv[1], sources.resolve(sys.argv[2:]), "bpe:500")
        """
    )
    for seed, name in enumerate("ab"):
        command = [sys.executable, "-c", program, str(tmp_path / name), *three_files.values()]
        subprocess.run(command, check=True, env={**os.environ, "PYTHONHASHSEED": str(seed)})
    first, second = read_all(tmp_path / "a"), read_all(tmp_path / "b")
    assert len(first) == 2 + 3 * 4
    assert first == second


def test_documents_come_back_and_splits_are_disjoint(mixed, three_texts):
    for name, texts in three_texts.items():
        back = {
            split: [mixed.tokenizer.decode(ids) for ids in mixed.documents(name, split)]
            for split in ("train", "val")
        }
        assert back["val"] and not set(back["train"]) & set(back["val"])
        assert back["val"] == [text for text in texts if goes_to_val(text, 200)]
        assert back["train"] == [text for text in texts if not goes_to_val(text, 200)]


def test_the_tokenizer_is_trained_on_training_text_of_every_source(three_files, three_texts):
    chosen = sources.resolve(list(three_files.values()))
    sample = list(preparation.training_sample(chosen, 200, limit=3000))
    assert not any(goes_to_val(text, 200) for text in sample)
    for texts in three_texts.values():
        part = [text for text in sample if text in texts]
        assert part == [text for text in texts if not goes_to_val(text, 200)][: len(part)]
        sizes = [len(text.encode()) for text in part]
        assert sum(sizes[:-1]) < 1000 <= sum(sizes)


def test_a_large_source_is_never_held_in_memory(tmp_path, monkeypatch):
    """Documents in flight stay bounded by the batch, however many there are."""
    monkeypatch.setattr(preparation, "_BATCH_CHARACTERS", 1000)
    alive = written = most = 0

    def documents():
        nonlocal alive, most
        for i in range(500):
            alive += 1
            most = max(most, alive - written)
            yield f"document {i} " + "x" * 90

    class Writer(preparation.StreamWriter):
        def add(self, ids, num_bytes):
            nonlocal written
            written += 1
            super().add(ids, num_bytes)

    monkeypatch.setattr(preparation, "StreamWriter", Writer)
    corpus = sources.Corpus(documents, dict)
    preparation.prepare(tmp_path / "out", [sources.Source("a", "a", corpus)], "bytes")
    assert written == 500 and most <= 12


def test_a_failed_preparation_leaves_nothing(tmp_path):
    def documents():
        yield "some text"
        raise RuntimeError("the disk is gone")

    source = sources.Source("a", "a", sources.Corpus(documents, dict))
    with pytest.raises(RuntimeError, match="the disk is gone"):
        preparation.prepare(tmp_path / "below" / "out", [source], "bytes")
    assert list((tmp_path / "below").iterdir()) == []


def test_wrong_arguments(tmp_path, texts_file):
    chosen = sources.resolve([texts_file])
    with pytest.raises(ValueError, match=r"val_permille is 1000: .* 0 to 999"):
        preparation.prepare(tmp_path / "out", chosen, "bytes", val_permille=1000)
    with pytest.raises(ValueError, match="'bites' is not a tokenizer"):
        preparation.prepare(tmp_path / "out", chosen, "bites")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("precious")
    with pytest.raises(ValueError, match=r"out: .*full exists and is not an empty folder"):
        preparation.prepare(tmp_path / "full", chosen, "bytes")
    [val_text] = [text for text in TEXTS if goes_to_val(text, 300)][:1]
    (tmp_path / "one.txt").write_text(val_text)
    with pytest.raises(ValueError, match=r"all 1 document\(s\) of .* fell into validation"):
        chosen = sources.resolve([f"files:{tmp_path}/one.txt"])
        preparation.prepare(tmp_path / "out", chosen, "bytes", val_permille=300)
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_that_uses_its_document_token_is_refused(tmp_path, texts_file):
    class Wrong(tokenizers.ByteTokenizer):
        document_token = ord("D")

        def __init__(self):
            super().__init__()
            self.document_token = ord("D")

    source = sources.resolve([texts_file])[0]
    with pytest.raises(ValueError, match="encodes text of a document as its document token 68"):
        preparation._write_source(tmp_path / "x", source, Wrong(), 0, lambda *_: None)


def test_yardsticks(monkeypatch):
    text = Path(argparse.__file__).read_bytes()  # long and varied: levels 6 and 9 differ on it
    measured = yardsticks.measure(text)
    shares = np.unique(list(text), return_counts=True)[1] / len(text)
    assert measured["unigram"] == pytest.approx(-(shares * np.log2(shares)).sum(), abs=1e-4)
    assert measured["gzip"] == pytest.approx(
        (len(zlib.compress(text, 9)) + 12) * 8 / len(text),
        abs=1e-4,  # gzip frames by 18, zlib by 6
    )
    plain = lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)
    assert measured["xz"] == pytest.approx(len(plain) * 8 / len(text), abs=1e-4)
    assert yardsticks.measure(b"") == {"bytes": 0}
    monkeypatch.setattr(yardsticks, "MAX_BYTES", 8)
    assert yardsticks.measure(b"aabbccdd" + b"x" * 100)["unigram"] == 2.0


def test_a_damaged_folder_is_refused(mixed, tmp_path):
    def copy():
        folder = tmp_path / "copy"
        for name, data in read_all(mixed.folder).items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        return folder

    assert dataset.open_dataset(copy()).fingerprint == mixed.fingerprint
    stream = copy() / "two" / "train.bin"
    size = stream.stat().st_size
    os.truncate(stream, size - 2)
    with pytest.raises(ValueError, match=rf"two/train.bin holds {size - 2} bytes .* {size} bytes"):
        dataset.open_dataset(tmp_path / "copy")
    stream.unlink()
    with pytest.raises(ValueError, match=r"two/train.bin is missing"):
        dataset.open_dataset(tmp_path / "copy")
    (copy() / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="is not the tokenizer that made this folder"):
        dataset.open_dataset(tmp_path / "copy")
    meta = copy() / "meta.json"
    meta.write_text(meta.read_text()[:-10])
    with pytest.raises(ValueError, match=r"meta.json is damaged"):
        dataset.open_dataset(tmp_path / "copy")
    meta.write_text('{"format": 99}')
    with pytest.raises(ValueError, match="has format 99 and this version of effarch reads 1"):
        dataset.open_dataset(tmp_path / "copy")
    with pytest.raises(ValueError, match=r"is not a prepared folder.*effarch.prepare_data.*--out="):
        dataset.find_or_prepare(["embedded:stdlib"], "bytes", path=str(tmp_path / "nowhere"))


def test_find_or_prepare_prepares_once_for_each_content(tmp_path, texts_file, monkeypatch):
    calls = []
    prepare = preparation.prepare
    monkeypatch.setattr(
        preparation, "prepare", lambda *args, **kw: calls.append(args) or prepare(*args, **kw)
    )

    def find(*args, **kwargs):
        return dataset.find_or_prepare(*args, cache_dir=str(tmp_path / "cache"), **kwargs)

    first = find([texts_file], "bytes", 300)
    assert find([texts_file], "bytes", 300).folder == first.folder
    assert len(calls) == 1
    assert find([texts_file], "bytes", 301).folder != first.folder
    assert find([texts_file], "bpe:300", 300).folder != first.folder
    with open(texts_file.removeprefix("files:"), "a") as file:
        file.write('{"text": "one more"}\n')
    changed = find([texts_file], "bytes", 300)
    assert changed.folder != first.folder
    docs = [
        sum(each.count("files", split, "docs") for split in ("train", "val"))
        for each in (first, changed)
    ]
    assert docs == [40, 41]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    elsewhere = dataset.find_or_prepare([texts_file], "bytes", 300)
    assert elsewhere.folder.parent == tmp_path / "xdg" / "effarch"
    assert dataset.find_or_prepare([], "", path=str(first.folder)).sources == ("files",)
    with pytest.raises(ValueError, match=r"^sources: all 41 document\(s\) .* fell into validation"):
        find([texts_file], "bpe:300", 999)
    with pytest.raises(ValueError, match="'hf:a/b' is read in preparation only: run `python -m"):
        find(["hf:a/b"], "bytes")


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.multiprocess
def test_two_processes_prepare_once_and_draw_the_same_batches(tmp_path, three_files):
    program = textwrap.dedent(
        """
        import hashlib, os, pathlib, sys, time
        from effarch.data import dataset, pipeline, preparation
        prepare = preparation.prepare
        def count(*args, **kwargs):
            print("prepared")
            time.sleep(0.5)  # the other process has time to come and find nothing
            return prepare(*args, **kwargs)
        preparation.prepare = count
        ready = pathlib.Path(sys.argv[1])
        (ready / f"{os.getpid()}.ready").touch()
        while len(list(ready.glob("*.ready"))) < 2:
            time.sleep(0.01)
        data = dataset.find_or_prepare(sys.argv[2:], "bytes", 100, cache_dir=sys.argv[1])
        train = pipeline.TrainBatches(
            data, batch_size=4, seq_len=32, seed=7, weights=(0.5, 0.3, 0.2)
        )
        digest = hashlib.sha256()
        for step in range(100):
            for name, array in sorted(train(step).items()):
                digest.update(f"{name}{array.dtype}{array.shape}".encode() + array.tobytes())
        print(digest.hexdigest())
        """
    )
    command = [sys.executable, "-c", program, str(tmp_path), *three_files.values()]
    started = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [process.communicate(timeout=300)[0].split() for process in started]
    assert [process.returncode for process in started] == [0, 0]
    assert sorted(len(output) for output in outputs) == [1, 2]  # one of them said "prepared"
    assert outputs[0][-1] == outputs[1][-1] and len(outputs[0][-1]) == 64


def test_command_line(tmp_path, texts_file):
    def run(*arguments):
        return subprocess.run(
            [sys.executable, "-m", "effarch.prepare_data", *arguments],
            capture_output=True,
            text=True,
        )

    done = run(
        f"--source={texts_file}",
        "--tokenizer=bytes",
        "--names=mine",
        "--val_permille=300",
        f"--out={tmp_path}/out",
    )
    assert done.returncode == 0, done.stderr
    assert "mine" in done.stdout and "unigram" in done.stdout
    assert dataset.open_dataset(tmp_path / "out").sources == ("mine",)
    wrong = run("--source=embedded:stdlb", f"--out={tmp_path}/other")
    assert wrong.returncode == 2
    assert "Did you mean 'embedded:stdlib'" in wrong.stderr and "Traceback" not in wrong.stderr
