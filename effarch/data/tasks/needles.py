"""Single needle in a haystack (S-NIAH): RULER, arXiv 2404.06654; templates of its `niah.py`, as bytes.

Variant 1: four sentences about grass and sky, repeated, hide a number; 2: running text hides a number;
3: running text hides a UUID. The row ends with the question, the beginning of its answer and the value,
whose bytes are scored; what is left of the row is padding.

Differs: tokens are UTF-8 bytes, keys come from our own words, and running text is the language reference
of the installed Python (`pydoc_data.topics`), so that variants 2 and 3 compare with no published number.
Published models are not trained on the task; here they are, on answers alone.
"""

import functools
import re
import uuid

import numpy as np

from effarch.data.tasks import rows

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
_ADJECTIVES = """
    able aged bold brave brief bright broad calm cheap clean clear clever cold cool crisp curly dark dear
    deep dim dry dull eager early easy empty faint fair fast fierce fine firm flat fond frank free fresh
    full gentle glad grand great green grim happy hard heavy high hollow honest huge humble icy idle keen
    kind large late lazy light lively lonely loud low
"""
_NOUNS = """
    acorn anchor apple arrow badge banner barrel basin basket beacon bell bench birch boat bottle bridge
    brook bucket button cabin candle canyon castle cedar chair clock cloud coat comet copper coral cradle
    crane crown curtain desk dolphin drum eagle engine falcon feather fence field flute forest garden
    gate glove hammer harbor hill island jacket kettle ladder lamp lantern lemon maple meadow mirror
    needle oven
"""
ADJECTIVES, NOUNS = _ADJECTIVES.split(), _NOUNS.split()
_DEPTHS = np.linspace(0, 1, 40)


class Needles:
    """Words are bytes."""

    groups = ()
    vocab_size = 256

    def __init__(self, seq_len: int, *, variant: int = 1):
        rows.require(variant in (1, 2, 3), "needles.variant", variant, "must be 1, 2 or 3")
        if seq_len < 512:
            raise ValueError(f"data.seq_len={seq_len} must be at least 512 bytes for needles.")
        self.seq_len, self.variant = seq_len, variant

    def draw(self, rng: np.random.Generator, count: int) -> rows.Rows:
        """`count` examples."""
        words = np.zeros((count, self.seq_len + 1), np.uint8)
        is_answer, is_text = np.zeros((2, *words.shape), bool)
        for row in range(count):
            text, answer = self._example(rng)
            data, first = (text + answer).encode(), len(text.encode())
            words[row, : len(data)] = np.frombuffer(data, np.uint8)
            is_answer[row, first : len(data)], is_text[row, : len(data)] = True, True
        segment_ids = is_text[:, :-1].astype(int)
        return rows.Rows(words[:, :-1], words[:, 1:], is_answer[:, 1:], segment_ids=segment_ids)

    def _example(self, rng: np.random.Generator) -> tuple[str, str]:
        """Everything up to the value, and the value."""
        key = f"{ADJECTIVES[rng.integers(len(ADJECTIVES))]}-{NOUNS[rng.integers(len(NOUNS))]}"
        if self.variant == 3:
            kind, value = "uuid", str(uuid.UUID(bytes=rng.bytes(16), version=4))
        else:
            kind, value = "number", str(rng.integers(10**6, 10**7))
        about = f"the special magic {kind} for {key} mentioned in the provided text"
        before = (
            f"A special magic {kind} is hidden within the following text. Make sure to memorize it. "
            f"I will quiz you about the {kind} afterwards.\n"
        )
        after = f"\nWhat is {about}? The{about[3:]} is "
        needle = f"One of the special magic {kind}s for {key} is: {value}."
        room = self.seq_len + 1 - sum(len(x.encode()) + 1 for x in (before, needle, after, value))
        return before + self._context(rng, needle, room) + after, value

    def _context(self, rng: np.random.Generator, needle: str, room: int) -> str:
        """As much of the haystack as has room, with the needle in it."""
        glue = "\n" if self.variant == 1 else " "
        if self.variant == 1:
            sentences = [NOISE] * (room // (len(NOISE) + 1))
            place = int(rng.integers(len(sentences) + 1))
        else:
            text = _sentences()
            start = int(rng.integers(len(text)))
            sentences = []
            while (room := room - len(text[start % len(text)].encode()) - 1) >= 0:
                sentences.append(text[start % len(text)])
                start += 1
            place = round(len(sentences) * rng.choice(_DEPTHS))
        return glue.join([*sentences[:place], needle, *sentences[place:]])


@functools.cache
def _sentences() -> list[str]:
    """The sentences of Python's language reference."""
    from pydoc_data import topics  # half a megabyte that few runs need

    text = " ".join(" ".join(topics.topics[name].split()) for name in sorted(topics.topics))
    return [part for part in re.split(r"(?<=[.!?]) ", text) if 20 <= len(part) <= 200]
