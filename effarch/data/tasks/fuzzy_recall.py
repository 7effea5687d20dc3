"""Fuzzy in-context recall: MAD, arXiv 2403.17844; generator of its `instances.py`.

    . . k2k5k1 v3 k4 v6v1 k2k5k1 v3          keys and values are tuples of 1 to 3 different words

Keys are tuples of the lower half of the words below W-1, values of the upper half; lengths and tuples
are drawn uniformly, a key keeps its value. One pair, the probe, also stands at a drawn place and ends
the row of S + 1 words; what is missing on the left is word W-1. Trained on every next word; scored on
the values of keys seen before, in rows whose keys all have the greatest length.
"""

import math

import numpy as np

from effarch.data.tasks import rows


class FuzzyRecall:
    """`key_length` and `value_length` are the most words of a tuple."""

    groups = ()

    def __init__(
        self, seq_len: int, *, vocab_size: int = 16, key_length: int = 3, value_length: int = 3
    ):
        self.seq_len, self.vocab_size = seq_len, vocab_size
        self.key_length, self.value_length = key_length, value_length
        self.half = (vocab_size - 1) // 2
        lengths = (key_length, value_length)
        field = "fuzzy_recall.key_length, value_length"
        remedy = f"must be 1 to {self.half}, half of the words: change them or vocab_size"
        rows.require(min(lengths) >= 1 and max(lengths) <= self.half, field, lengths, remedy)
        remedy = f"do not fit data.seq_len={seq_len}: it must exceed 4 times their sum"
        rows.require(seq_len > 4 * sum(lengths), field, lengths, remedy)

    def draw(self, rng: np.random.Generator, count: int) -> rows.Rows:
        """`count` examples to train on."""
        return self._draw(rng, count, shortest=1)

    def draw_scored(self, rng: np.random.Generator, count: int) -> rows.Rows:
        """`count` examples to score."""
        return self._draw(rng, count, shortest=self.key_length)

    def _draw(self, rng: np.random.Generator, count: int, *, shortest: int) -> rows.Rows:
        sizes = (count, self.seq_len // 2 + 2)  # rows, and pairs of a row: the probe first
        keys = _tuples(rng, sizes, self.half, shortest, self.key_length)
        upper = self.vocab_size - 1 - self.half
        values = _tuples(rng, sizes, upper, 1, self.value_length)
        places_N = rng.random(count)
        words = np.full((count, self.seq_len + 1), self.vocab_size - 1)
        is_answer = np.zeros(words.shape, bool)
        for row in range(count):
            found, marks = self._row(keys[row], values[row], places_N[row])
            words[row, -len(found) :], is_answer[row, -len(found) :] = found, marks
        trained = np.ones((count, self.seq_len), bool)
        return rows.Rows(words[:, :-1], words[:, 1:], is_answer[:, 1:], trained)

    def _row(self, keys, values, place: float) -> tuple[list[int], list[bool]]:
        """The words of a row, without padding, and which of them are scored."""
        probe = keys[0]
        probe_size = len(probe) + len(values[0])
        known = {probe: values[0]}
        seen, found, marks = set(), [], []

        def add(key, value) -> None:
            found.extend(key)
            found.extend(word + self.half for word in value)
            marks.extend([False] * len(key) + [key in seen] * len(value))
            seen.add(key)

        probe_place = int(place * (self.seq_len - 2 * probe_size))
        room = self.seq_len - probe_size - (self.key_length + self.value_length)
        pairs = iter(zip(keys[1:], values[1:]))
        while len(found) < room:
            if len(found) >= probe_place and probe not in seen:
                add(probe, known[probe])
            else:
                key, value = next(pairs)
                add(key, known.setdefault(key, value))
        if probe not in seen:
            add(probe, known[probe])
        add(probe, known[probe])
        return found, marks


def _tuples(rng: np.random.Generator, sizes: tuple[int, int], num_words: int, low: int, high: int):
    """For each row its tuples of `low` to `high` different words below `num_words`."""
    drawn = rows.distinct(rng, math.prod(sizes), num_words, high).reshape(*sizes, high)
    lengths = rng.integers(low, high + 1, size=sizes)
    return [
        [tuple(words[:length].tolist()) for words, length in zip(*row)]
        for row in zip(drawn, lengths)
    ]
