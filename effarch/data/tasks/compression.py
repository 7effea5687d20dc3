"""Compression: MAD, arXiv 2403.17844; the examples of its `instances.py`, another read-out.

    x1 x2 ... xn C C C ... C                  targets at C and the places after it: x1 x2 ... xn

n words drawn with repeats from 0 ... W-2, then the word C (W-1), which must hold them all.

Differs: the published model is an auto-encoder, whose perceptron decodes all words from the encoder's
last output. Here the model itself writes them down at C and the places after it, which hold C as well.
For a recurrent mixer that is still a test of what its state holds; attention can look the words up, so
nothing compresses it.
"""

import numpy as np

from effarch.data.tasks import rows


class Compression:
    """n = S // 2 words; with an odd S the last place is padding."""

    groups = ()

    def __init__(self, seq_len: int, *, vocab_size: int = 16):
        rows.require(vocab_size >= 2, "compression.vocab_size", vocab_size, "must be at least 2")
        if seq_len < 2:
            raise ValueError(f"data.seq_len={seq_len} must be at least 2 for compression.")
        self.seq_len, self.vocab_size = seq_len, vocab_size

    def draw(self, rng: np.random.Generator, count: int) -> rows.Rows:
        """`count` examples."""
        num = self.seq_len // 2
        words_NM = rng.integers(self.vocab_size - 1, size=(count, num))
        inputs = np.full((count, self.seq_len), self.vocab_size - 1)
        inputs[:, :num] = words_NM
        targets, answers = np.zeros_like(inputs), np.zeros(inputs.shape, bool)
        targets[:, num : 2 * num], answers[:, num : 2 * num] = words_NM, True
        segment_ids = np.ones_like(inputs)
        segment_ids[:, 2 * num :] = 0
        return rows.Rows(inputs, targets, answers, segment_ids=segment_ids)
