"""Selective copying: MAD, arXiv 2403.17844; generator of its `instances.py`.

    . . x1 . x2 . . . x3 C _ _ _             targets at the last n places: x1 x2 x3

n words, drawn with repeats from 0 ... W-3, stand in their order among S-2n-1 blanks (W-2), each of which
falls before a drawn word; then the copy word C (W-1) and n blanks, at which the words are due.
"""

import numpy as np

from effarch.data.tasks import rows


class SelectiveCopying:
    """Trained and scored on the n copied words."""

    groups = ()

    def __init__(self, seq_len: int, *, vocab_size: int = 16, num_words: int = 16):
        """`num_words` is n."""
        rows.require(
            num_words >= 1 and seq_len > 2 * num_words + 1,
            *("selective_copying.num_words", num_words),
            f"does not fit data.seq_len={seq_len}: it must exceed 2 num_words + 1",
        )
        name = "selective_copying.vocab_size"
        rows.require(vocab_size >= 4, name, vocab_size, "must be at least 4")
        self.seq_len, self.vocab_size, self.num_words = seq_len, vocab_size, num_words

    def draw(self, rng: np.random.Generator, count: int) -> rows.Rows:
        """`count` examples."""
        num, blank = self.num_words, self.vocab_size - 2
        blanks = self.seq_len - 2 * num - 1
        words_NM = rng.integers(blank, size=(count, num))
        # Sorted by place, word i has place i + 1/2 and a blank before word i place i.
        gaps_NM = rng.integers(num, size=(count, blanks)).astype(float)
        places_NM = np.concatenate(
            [np.broadcast_to(np.arange(num) + 0.5, (count, num)), gaps_NM], axis=1
        )
        filled_NM = np.concatenate([words_NM, np.full((count, blanks), blank)], axis=1)
        inputs = np.full((count, self.seq_len), blank)
        order = np.argsort(places_NM, axis=1, kind="stable")
        inputs[:, : num + blanks] = np.take_along_axis(filled_NM, order, axis=1)
        inputs[:, num + blanks] = self.vocab_size - 1
        targets, answers = np.zeros_like(inputs), np.zeros(inputs.shape, bool)
        targets[:, -num:], answers[:, -num:] = words_NM, True
        return rows.Rows(inputs, targets, answers)
