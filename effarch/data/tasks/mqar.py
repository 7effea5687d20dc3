"""Multi-query associative recall: Zoology, arXiv 2312.04927; generator of its `multiquery_ar.py`.

    k1 v1 k2 v2 ... kK vK  . . k2 . . . . k1 . . . k3 . .      target at the second k_i: v_i

Keys are distinct words of 1 ... W/2-1, values distinct words of W/2 ... W-1. The rest of the row has
(S - 2K)/2 slots of two tokens; the i-th slot that is drawn, without repeats and with p(g) ~ g^(a-1) for
g = 1, 2, ..., holds key i. All other places hold random words, or 0.

Differs: a run may mix several K at one S, as the later sweep of arXiv 2402.18668 does over several S.
"""

import numpy as np

from effarch.data.tasks import rows


class Mqar:
    """Accuracy is reported for each number of pairs."""

    def __init__(
        self,
        seq_len: int,
        *,
        vocab_size: int = 8192,
        num_pairs: tuple[int, ...] = (8,),
        power: float = 0.01,
        random_fill: bool = True,
    ):
        """`num_pairs`: K of each row is one of these, as often as the others. `power` is a: near 0
        keys return soon, 1 anywhere. `random_fill` False leaves 0 between the queries."""
        most = max(num_pairs, default=0)
        rows.require(
            seq_len % 2 == 0 and min(num_pairs, default=0) >= 1 and 4 * most <= seq_len,
            *("mqar.num_pairs", num_pairs),
            f"does not fit data.seq_len={seq_len}: give an even seq_len of 4 tokens a pair or more",
        )
        rows.require(
            vocab_size // 2 - 1 >= most and vocab_size > seq_len,
            *("mqar.vocab_size", vocab_size),
            f"must exceed data.seq_len={seq_len} and hold a key and a value for each pair",
        )
        rows.require(power > 0, "mqar.power", power, "must be above 0")
        self.seq_len, self.vocab_size, self.num_pairs = seq_len, vocab_size, tuple(num_pairs)
        self.power, self.random_fill = power, random_fill
        self.groups = tuple(f"{num}_pairs" for num in num_pairs)

    def draw(self, rng: np.random.Generator, count: int) -> rows.Rows:
        """`count` examples."""
        groups_N = rng.integers(len(self.num_pairs), size=count)
        inputs = np.zeros((count, self.seq_len), np.int32)
        targets = np.zeros_like(inputs)
        answers = np.zeros(inputs.shape, bool)
        for group, num in enumerate(self.num_pairs):
            places = np.flatnonzero(groups_N == group)
            if len(places):
                part = self._rows(rng, len(places), num)
                inputs[places], targets[places], answers[places] = part
        if self.random_fill:
            free = inputs == 0
            inputs[free] = rng.integers(self.vocab_size, size=int(free.sum()))
        return rows.Rows(inputs, targets, answers, groups=groups_N)

    def _rows(self, rng: np.random.Generator, count: int, num: int):
        half = self.vocab_size // 2
        keys_NK = 1 + rows.distinct(rng, count, half - 1, num)
        values_NK = half + rows.distinct(rng, count, self.vocab_size - half, num)
        slots = (self.seq_len - 2 * num) // 2
        # The smallest of E / p, E exponential, are a sequential draw without repeats by weights p.
        weights = np.arange(1, slots + 1) ** (self.power - 1)
        slots_NK = rows.first_places(rng.exponential(size=(count, slots)) / weights, num)
        inputs = np.zeros((count, self.seq_len), np.int32)
        inputs[:, 0 : 2 * num : 2], inputs[:, 1 : 2 * num : 2] = keys_NK, values_NK
        targets, answers = np.zeros_like(inputs), np.zeros(inputs.shape, bool)
        places_NK = 2 * num + 2 * slots_NK
        np.put_along_axis(inputs, places_NK, keys_NK, axis=1)
        np.put_along_axis(targets, places_NK, values_NK, axis=1)
        np.put_along_axis(answers, places_NK, True, axis=1)
        return inputs, targets, answers
