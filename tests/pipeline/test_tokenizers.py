import json

import hypothesis
import numpy as np
import pytest
import tokenizers as hf
from hypothesis import strategies
from tokenizers import decoders, models, pre_tokenizers

from effarch.data import sources, tokenizers

TEXTS = [
    "the cat sat on the mat, the mat sat",
    "größe 日本語 😀 größe",
    "def f(x):\n    return x\n",
]


@pytest.fixture(scope="module")
def bpe():
    return tokenizers.build("bpe:300", lambda: iter(TEXTS * 3))


@pytest.fixture(scope="module")
def word_piece(tmp_path_factory):
    """A tokenizer that is not byte-level: SentencePiece-like words with byte fallback."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁the", "▁cat"]
    model = models.BPE(
        vocab={piece: i for i, piece in enumerate([*pieces, "▁", *"catheüß"])},
        merges=[],
        byte_fallback=True,
        unk_token="<unk>",
    )
    tokenizer = hf.Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    tokenizer.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Fuse(), decoders.Metaspace(prepend_scheme="never")]
    )
    tokenizer.add_special_tokens(["<s>", "</s>"])
    path = tmp_path_factory.mktemp("words") / "tokenizer.json"
    tokenizer.save(str(path))
    return path


def test_bytes():
    tokenizer = tokenizers.build("bytes", None)
    assert tokenizer.encode("aé").tolist() == [97, 0xC3, 0xA9]
    assert (tokenizer.document_token, tokenizer.true_size, tokenizer.vocab_size) == (256, 257, 320)
    assert tokenizer.dtype == np.uint16
    assert tokenizer.decode([97, 256, 0xC3, 0xA9, 300]) == "aé"
    assert tokenizer.byte_lengths.tolist() == [1] * 256 + [0] * 64


def test_bpe_sizes_and_document_token(bpe):
    assert bpe.document_token == 0
    assert bpe.true_size <= 300
    assert bpe.vocab_size == 320
    assert bpe.byte_lengths.shape == (320,)
    assert bpe.byte_lengths[0] == 0
    assert len(bpe.encode("the mat")) < 7


@hypothesis.given(strategies.text(strategies.characters(exclude_categories=["Cs"])))
@hypothesis.settings(max_examples=150, deadline=None)
def test_round_trip_of_any_text(bpe, text):
    for tokenizer in (bpe, tokenizers.ByteTokenizer()):
        ids = tokenizer.encode(text)
        assert tokenizer.decode_bytes(ids) == text.encode()
        assert tokenizer.decode(ids) == text
        assert tokenizer.byte_lengths[ids].sum() == len(text.encode())
        assert tokenizer.document_token not in ids
        stream = tokenizer.stream()
        assert "".join(map(stream.push, ids)) + stream.flush() == text


def test_a_spelled_document_token_is_only_text(bpe):
    text = "a<|endoftext|>b"
    ids = bpe.encode(text)
    assert 0 not in ids
    assert bpe.decode(ids) == text


def test_training_is_repeatable_and_the_hash_follows_the_text(bpe):
    again = tokenizers.build("bpe:300", lambda: iter(TEXTS * 3))
    other = tokenizers.build("bpe:300", lambda: iter(TEXTS[:2] * 3))
    assert again.to_json() == bpe.to_json()
    assert again.sha256 == bpe.sha256 != other.sha256
    loaded = tokenizers.load("bpe:300", bpe.to_json(), 0)
    assert loaded.sha256 == bpe.sha256
    assert loaded.encode(TEXTS[1]).tolist() == bpe.encode(TEXTS[1]).tolist()


def test_stream_never_gives_part_of_a_character(bpe):
    for tokenizer in (bpe, tokenizers.ByteTokenizer()):
        stream = tokenizer.stream()
        pushed = [stream.push(token) for token in tokenizer.encode("a😀ü")]
        assert "\ufffd" not in "".join(pushed)
        assert "".join(pushed) == "a😀ü"
    stream = tokenizers.ByteTokenizer().stream()
    assert stream.push(0xF0) == "" and stream.flush() == "\ufffd"


def test_file_tokenizer_that_is_not_byte_level(word_piece):
    tokenizer = tokenizers.build(f"file:{word_piece}", None)
    assert tokenizer.document_token == 2  # </s>
    assert not tokenizer.is_exact
    text = "cat the Ω cat"
    ids = tokenizer.encode(text)
    assert tokenizer.decode([2, *ids]) == text
    assert tokenizer.byte_lengths[ids].sum() == len(text.encode())
    stream = tokenizer.stream()
    assert "".join(map(stream.push, ids)) + stream.flush() == text
    with pytest.raises(ValueError, match="is not byte-level"):
        tokenizer.decode_bytes(ids)
    assert tokenizers.build(f"file:{word_piece}#<s>", None).document_token == 1


def test_file_tokenizer_equals_the_one_it_was_saved_from(bpe, tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text(bpe.to_json(), encoding="utf-8")
    tokenizer = tokenizers.build(f"file:{path}", None)
    assert tokenizer.is_exact
    assert tokenizer.document_token == bpe.document_token
    assert tokenizer.encode(TEXTS[1]).tolist() == bpe.encode(TEXTS[1]).tolist()


@pytest.mark.parametrize(
    "change",
    [
        {"normalizer": {"type": "Lowercase"}},
        {"decoder": None},
        {
            "pre_tokenizer": {
                "type": "ByteLevel",
                "add_prefix_space": True,
                "trim_offsets": True,
                "use_regex": True,
            }
        },
    ],
)
def test_a_tokenizer_that_changes_text_is_not_exact(bpe, tmp_path, change):
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(json.loads(bpe.to_json()) | change), encoding="utf-8")
    assert not tokenizers.build(f"file:{path}", None).is_exact


@pytest.mark.parametrize(
    ("spec", "sentence"),
    [
        ("byte", "'byte' is not a tokenizer. Write one of bytes, bpe:V"),
        ("bpe", "'bpe' does not name a size: write bpe:V with V of at least 257"),
        ("bpe:big", "'bpe:big' does not name a size"),
        ("bpe:256", "'bpe:256' does not name a size"),
        ("file:", "'file:' is not a tokenizer"),
        ("file:/nowhere/t.json", "'file:/nowhere/t.json' cannot be read .No such file"),
    ],
)
def test_a_wrong_tokenizer_is_refused(spec, sentence):
    with pytest.raises(ValueError, match=sentence):
        tokenizers.check(spec)


def test_a_wrong_tokenizer_file_is_refused(bpe, word_piece, tmp_path):
    path = tmp_path / "t.json"
    path.write_text('{"model": 3}')
    with pytest.raises(ValueError, match=r"is not a tokenizer.json of the tokenizers library"):
        tokenizers.check(f"file:{path}")
    path.write_text(bpe.to_json().replace("<|endoftext|>", "<|other|>"), encoding="utf-8")
    with pytest.raises(ValueError, match="holds none of the usual document tokens"):
        tokenizers.check(f"file:{path}")
    assert tokenizers.build(f"file:{path}#<|other|>", None).document_token == 0
    with pytest.raises(ValueError, match="holds no token '<nope>'"):
        tokenizers.check(f"file:{word_piece}#<nope>")


@pytest.mark.slow
def test_round_trip_of_every_embedded_document():
    [source] = sources.resolve(["embedded:stdlib"])
    texts = list(source.documents())
    for spec in ("bytes", "bpe:4096"):
        tokenizer = tokenizers.build(spec, lambda: iter(texts[::5]))
        for text, ids in zip(texts, tokenizer.encode_batch(texts)):
            assert tokenizer.decode_bytes(ids) == text.encode()
            assert tokenizer.byte_lengths[ids].sum() == len(text.encode())
