"""Memorization: MAD, arXiv 2403.17844; generator of its `instances.py`.

    k7 I k2 I k7 I ...                        target at each I: the value of the key before it

A fixed map from keys, the lower half of the words below W-1, to values, the upper half, is the same in
every example of training and validation; I is word W-1. It tests what the weights hold: nothing in a
row tells a value. Published with 256 training examples: data.task.num_examples=256.
"""

import numpy as np

from effarch.data.tasks import rows


class Memorization:
    """The map is a random matching of keys and values, of its own seed."""

    groups = ()

    def __init__(self, seq_len: int, *, vocab_size: int = 256, map_seed: int = 12345):
        rows.require(vocab_size >= 3, "memorization.vocab_size", vocab_size, "must be at least 3")
        if seq_len % 2:
            raise ValueError(f"data.seq_len={seq_len} must be even for memorization.")
        self.seq_len, self.vocab_size = seq_len, vocab_size
        half = (vocab_size - 1) // 2
        values = np.arange(half, vocab_size - 1)
        self.values = np.random.default_rng(map_seed).permutation(values)[:half]

    def draw(self, rng: np.random.Generator, count: int) -> rows.Rows:
        """`count` examples."""
        keys = rng.integers(len(self.values), size=(count, self.seq_len // 2))
        inputs = np.full((count, self.seq_len), self.vocab_size - 1)
        inputs[:, ::2] = keys
        targets, answers = np.zeros_like(inputs), np.zeros(inputs.shape, bool)
        targets[:, 1::2], answers[:, 1::2] = self.values[keys], True
        return rows.Rows(inputs, targets, answers)
