"""In-context linear regression: Garg et al., arXiv 2208.01066, in words.

    x1 y1 x2 y2 ... ,   x_i ~ N(0, I_d),   w ~ N(0, I_d),   y_i = (w . x_i + sigma N(0, 1)) / sqrt(d)

Differs: published inputs are real vectors, read in and out by linear maps and scored by squared error.
Here every number is the word of one of `bins` intervals of equal width over [-3, 3] (beyond: the last
ones), so that embedding, head and loss stay those of a language model: a point takes d words for x and
one for y, and y's word is due at the last word of x. The loss is the log loss of a density in steps.
"""

import numpy as np

from effarch.data.tasks import rows

REACH = 3.0
"""Intervals cover [-REACH, REACH]: 0.27 % of standard normal numbers lie beyond."""


class LinearRegression:
    """A row holds S // (d + 1) points, then padding; scored are the words of y."""

    groups = ()

    def __init__(self, seq_len: int, *, dimension: int = 4, bins: int = 32, noise: float = 0.0):
        """`dimension` is d, `noise` sigma."""
        rows.require(
            1 <= dimension < seq_len,
            *("linear_regression.dimension", dimension),
            f"must be at least 1 and below data.seq_len={seq_len}",
        )
        rows.require(bins >= 2, "linear_regression.bins", bins, "must be at least 2")
        rows.require(noise >= 0, "linear_regression.noise", noise, "must not be negative")
        self.seq_len, self.dimension, self.noise = seq_len, dimension, noise
        self.vocab_size = bins

    def draw(self, rng: np.random.Generator, count: int) -> rows.Rows:
        """`count` examples."""
        d, points = self.dimension, self.seq_len // (self.dimension + 1)
        x_NPd = rng.standard_normal((count, points, d))
        w_Nd = rng.standard_normal((count, d))
        y_NP = np.einsum("npd,nd->np", x_NPd, w_Nd)
        y_NP += self.noise * rng.standard_normal(y_NP.shape)
        numbers = np.concatenate([x_NPd, y_NP[..., None] / np.sqrt(d)], axis=-1)
        inputs = np.zeros((count, self.seq_len), int)
        used = points * (d + 1)
        inputs[:, :used] = self.words(numbers).reshape(count, used)
        answers = np.zeros(inputs.shape, bool)
        answers[:, d - 1 : used : d + 1] = True
        segment_ids = np.ones_like(inputs)
        segment_ids[:, used:] = 0
        return rows.Rows(inputs, np.roll(inputs, -1, 1), answers, segment_ids=segment_ids)

    def words(self, numbers: np.ndarray) -> np.ndarray:
        """The word of each number."""
        places = np.floor((numbers + REACH) * self.vocab_size / (2 * REACH))
        return np.clip(places, 0, self.vocab_size - 1).astype(int)

    def midpoints(self) -> np.ndarray:
        """[bins] the number in the middle of each word's interval."""
        return (np.arange(self.vocab_size) + 0.5) * 2 * REACH / self.vocab_size - REACH
