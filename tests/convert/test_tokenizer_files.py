"""The tokenizer of a run of ours, read back by the tokenizers library and by transformers."""

import json

import pytest
import tokenizers

from effarch.convert.hf import tokenizer_files
from effarch.data import tokenizers as tokenizers_lib

TEXT = "def f(x):\n    return 'h\u00e9llo  w\u00f6rld \u20ac 12345'  # ok\x00\x80\n"


def tokenizer_of(spec):
    return tokenizers_lib.build(spec, lambda: iter([TEXT * 3]))


@pytest.mark.parametrize("spec", ["bytes", "bpe:300"])
def test_it_cuts_as_ours(spec, tmp_path):
    ours = tokenizer_of(spec)
    tokenizer_files.write(ours, tmp_path)
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    ids = theirs.encode(TEXT).ids
    assert ids == list(ours.encode(TEXT))
    assert theirs.decode(ids) == TEXT
    content = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert theirs.token_to_id(content["eos_token"]) == ours.document_token
    assert content["bos_token"] == content["eos_token"]


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2"])
def test_transformers_cuts_as_ours_whatever_the_family(family, tmp_path):
    transformers = pytest.importorskip(
        "transformers", reason="transformers is not installed (extra peers)"
    )
    ours = tokenizer_of("bpe:300")
    tokenizer_files.write(ours, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family}))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs(TEXT).input_ids == list(ours.encode(TEXT))
    assert theirs.eos_token_id == ours.document_token
