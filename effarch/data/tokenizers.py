"""Text to token ids and back: `bytes`, `bpe:V`, `file:PATH[#TOKEN]` and `hf:NAME[#TOKEN]`.

Every tokenizer has one *document token*, which no text encodes to: it stands before each document.
`vocab_size` is the true size rounded up to a multiple of 64 (a model's matrices want that); the
ids above the true size never occur and decode to nothing.

`bytes`: ids 0-255 are the bytes of the UTF-8 text, 256 is the document token.
`bpe:V`: byte-level BPE (Sennrich et al., arXiv:1508.07909, on bytes as in GPT-2) trained on the
sources' own training documents; `<|endoftext|>` is id 0 and the document token.
"""

import abc
import codecs
import functools
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import tokenizers as hf
from tokenizers import decoders, models, pre_tokenizers, trainers

DOCUMENT_TOKEN = "<|endoftext|>"
# Tried in this order in a tokenizer.json that somebody else made.
KNOWN_DOCUMENT_TOKENS = (
    "<|endoftext|>",
    "<|end_of_text|>",
    "</s>",
    "<eos>",
    "<|eos|>",
    "[EOS]",
    "<|im_end|>",
    "[SEP]",
)
_KINDS = ("bytes", "bpe:V (such as bpe:4096)", "file:PATH[#TOKEN]", "hf:NAME[#TOKEN]")
_MIN_BPE = 257  # the 256 bytes and the document token


class Tokenizer(abc.ABC):
    """What the rest of the code needs from a tokenizer; `spec` says which one it is."""

    spec: str
    document_token: int
    true_size: int
    sha256: str
    token_bytes: tuple[bytes, ...]  # the UTF-8 bytes that each id stands for; b"" for special ids
    is_exact: bool  # token_bytes, joined, are the text

    @property
    def vocab_size(self) -> int:
        """The true size rounded up to a multiple of 64."""
        return -(-self.true_size // 64) * 64

    @property
    def dtype(self) -> np.dtype:
        """The smallest little-endian unsigned type for ids on disk: uint16 or uint32."""
        return np.dtype("<u2" if self.vocab_size <= 65535 else "<u4")

    @functools.cached_property
    def byte_lengths(self) -> np.ndarray:
        """UTF-8 bytes of each id, int32 [vocab_size]; 0 for the document token and padding ids."""
        lengths = np.zeros(self.vocab_size, np.int32)
        lengths[: self.true_size] = [len(piece) for piece in self.token_bytes]
        return lengths

    @abc.abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Token ids of each text, without document tokens."""

    def encode(self, text: str) -> np.ndarray:
        """Token ids of one text, without document tokens."""
        return self.encode_batch([text])[0]

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The exact bytes behind `ids`; document tokens and padding ids are left out."""
        if not self.is_exact:
            raise ValueError(
                f"tokenizer: {self.spec!r} is not byte-level, so its ids have no exact bytes: use "
                "decode, or a byte-level tokenizer (bytes, bpe:V)."
            )
        pieces = self.token_bytes
        return b"".join(pieces[i] for i in map(int, ids) if i < self.true_size)

    def decode(self, ids: Iterable[int]) -> str:
        """The text behind `ids`; bytes that are not UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def stream(self) -> "StreamDecoder":
        """A decoder for ids that come one by one."""
        return StreamDecoder(self)

    def to_json(self) -> str | None:
        """The text of tokenizer.json, or None where `spec` says everything."""
        return None


class StreamDecoder:
    """Text of a growing sequence of ids: `push` never returns a part of a character."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._ids: list[int] = []
        self._shown = ""

    def push(self, token: int) -> str:
        """The text that is certain after this id and was not before."""
        if self._tokenizer.is_exact:
            return self._utf8.decode(self._tokenizer.decode_bytes([token]))
        self._ids.append(int(token))
        text = self._tokenizer.decode(self._ids)
        return "" if text.endswith("\ufffd") else self._advance(text)

    def flush(self) -> str:
        """What is left at the end; an unfinished character becomes U+FFFD."""
        if self._tokenizer.is_exact:
            return self._utf8.decode(b"", final=True)
        return self._advance(self._tokenizer.decode(self._ids))

    def _advance(self, text: str) -> str:
        new, self._shown = text[len(self._shown) :], text
        return new


class ByteTokenizer(Tokenizer):
    """One id a byte."""

    def __init__(self):
        self.spec = "bytes"
        self.document_token = 256
        self.true_size = 257
        self.token_bytes = (*(bytes([value]) for value in range(256)), b"")
        self.is_exact = True
        self.sha256 = hashlib.sha256(b"bytes 0-255, document token 256").hexdigest()

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The UTF-8 bytes of each text, uint8."""
        return [np.frombuffer(text.encode("utf-8"), np.uint8) for text in texts]


class FileTokenizer(Tokenizer):
    """A tokenizer of the `tokenizers` library, from the text of its tokenizer.json."""

    def __init__(self, spec: str, text: str, document_token: str = ""):
        self.spec = spec
        self._json = text
        self._tokenizer = hf.Tokenizer.from_str(text)
        # A document that spells a special token, such as a tokenizer's own sources, is only text.
        self._tokenizer.encode_special_tokens = True
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self.document_token = self._find_document_token(document_token)
        self.true_size = 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values())
        self.is_exact = _is_exact(json.loads(text))
        self.token_bytes = tuple(_token_bytes(self._tokenizer, self.true_size))
        self.sha256 = hashlib.sha256(text.encode("utf-8")).hexdigest()

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Token ids of each text, uint32, in parallel."""
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.asarray(encoding.ids, np.uint32) for encoding in encodings]

    def decode(self, ids: Iterable[int]) -> str:
        """The text behind `ids`, by the tokenizer's own decoder."""
        if self.is_exact:
            return super().decode(ids)
        kept = [i for i in map(int, ids) if i < self.true_size and i != self.document_token]
        return self._tokenizer.decode(kept, skip_special_tokens=True)

    def to_json(self) -> str:
        """The text of tokenizer.json."""
        return self._json

    def _find_document_token(self, wanted: str) -> int:
        for name in [wanted] if wanted else KNOWN_DOCUMENT_TOKENS:
            token = self._tokenizer.token_to_id(name)
            if token is not None:
                return token
        if wanted:
            raise ValueError(
                f"tokenizer: {self.spec!r} holds no token {wanted!r}: name one of its special "
                "tokens after the '#'."
            )
        raise ValueError(
            f"tokenizer: {self.spec!r} holds none of the usual document tokens "
            f"({', '.join(KNOWN_DOCUMENT_TOKENS)}): name its own as {self.spec}#TOKEN."
        )


def build(spec: str, texts: Callable[[], Iterator[str]]) -> Tokenizer:
    """The tokenizer that `spec` names; only `bpe:V` reads `texts()`, to train on them."""
    kind, _, rest = spec.partition(":")
    path, _, document_token = rest.partition("#")
    if spec == "bytes":
        return ByteTokenizer()
    if kind == "bpe":
        return FileTokenizer(spec, train_bpe(_bpe_size(spec), texts()), DOCUMENT_TOKEN)
    if kind == "file" and path:
        return FileTokenizer(spec, _read_json(spec, Path(path)), document_token)
    if kind == "hf" and path:
        return FileTokenizer(spec, _fetch_json(spec, path), document_token)
    raise ValueError(f"tokenizer: {spec!r} is not a tokenizer. Write one of {', '.join(_KINDS)}.")


def check(spec: str) -> str:
    """Refuses a wrong `spec` before any work; returns the sha256 of a `file:` and else nothing."""
    kind, _, rest = spec.partition(":")
    if kind == "bpe":
        _bpe_size(spec)
    elif kind == "file" and rest.partition("#")[0]:
        return build(spec, lambda: iter(())).sha256
    elif not (kind == "hf" and rest):
        build(spec, lambda: iter(()))
    return ""


def load(spec: str, text: str | None, document_token: int) -> Tokenizer:
    """The tokenizer of a prepared folder, from what meta.json and tokenizer.json say."""
    if text is None:
        return ByteTokenizer()
    name = hf.Tokenizer.from_str(text).id_to_token(document_token)
    return FileTokenizer(spec, text, name or "")


def train_bpe(size: int, texts: Iterator[str]) -> str:
    """Text of the tokenizer.json of a byte-level BPE with at most `size` ids."""
    tokenizer = hf.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[DOCUMENT_TOKEN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer.to_str()


def _bpe_size(spec: str) -> int:
    size = spec.partition(":")[2]
    if not re.fullmatch(r"\d{1,7}", size) or int(size) < _MIN_BPE:
        raise ValueError(
            f"tokenizer: {spec!r} does not name a size: write bpe:V with V of at least "
            f"{_MIN_BPE} (256 bytes and the document token), such as bpe:4096."
        )
    return int(size)


def _read_json(spec: str, path: Path) -> str:
    try:
        text = path.expanduser().read_text(encoding="utf-8")
        hf.Tokenizer.from_str(text)
        return text
    except OSError as error:
        raise ValueError(
            f"tokenizer: {spec!r} cannot be read ({error.strerror}): give the path of a "
            "tokenizer.json."
        ) from None
    except Exception as error:  # the library raises plain Exception for a bad file
        raise ValueError(
            f"tokenizer: {spec!r} is not a tokenizer.json of the tokenizers library ({error})."
        ) from None


def _fetch_json(spec: str, name: str) -> str:
    try:
        return hf.Tokenizer.from_pretrained(name).to_str()
    except Exception as error:  # the library raises plain Exception for a missing name
        reason = str(error).strip().split("\n")[0]
        raise ValueError(
            f"tokenizer: {spec!r} could not be fetched from the hub ({reason}): check the name and "
            "the network, or use file:PATH on a tokenizer.json that you have."
        ) from None


def _is_exact(described: dict) -> bool:
    """Whether ids give back the text byte for byte: byte-level, nothing normalised or prefixed."""
    decoder = (described.get("decoder") or {}).get("type")
    before = json.dumps(described.get("pre_tokenizer"))
    prefixes = '"add_prefix_space": true' in before
    return decoder == "ByteLevel" and described.get("normalizer") is None and not prefixes


def _token_bytes(tokenizer: hf.Tokenizer, size: int) -> Iterator[bytes]:
    """The bytes of every id: exact for byte-level vocabularies, near for SentencePiece ones."""
    special = tokenizer.get_added_tokens_decoder()
    is_byte_level = isinstance(tokenizer.decoder, decoders.ByteLevel)
    for index in range(size):
        piece = tokenizer.id_to_token(index)
        if piece is None or (index in special and special[index].special):
            yield b""
        elif index in special:
            yield special[index].content.encode("utf-8")
        elif is_byte_level and set(piece) <= byte_of_character().keys():
            yield bytes(byte_of_character()[character] for character in piece)
        elif re.fullmatch(r"<0x[0-9A-F]{2}>", piece):  # byte fallback
            yield bytes([int(piece[3:5], 16)])
        else:
            yield piece.removeprefix("##").replace("\u2581", " ").encode("utf-8")


@functools.cache
def byte_of_character() -> dict[str, int]:
    """GPT-2's printable stand-ins: visible Latin-1 characters are themselves, the rest 256 + n."""
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {
        chr(256 + n): byte for n, byte in enumerate(hidden)
    }
