"""In-context recall, plain and noisy: MAD, arXiv 2403.17844; generator of its `instances.py`.

    k3 v7 k1 v2 k3 v7 ... k1 v2           a pair is two words; a key keeps the value of its first sight

Keys are drawn with repeats from the lower half of the words, a key's value from the upper half; the last
pair repeats a key. Noisy: a pair but one, drawn, and the last is two noise words with probability f;
noise words are the highest ones. Trained on every next word, scored on values of keys seen before.

Differs: a row holds all S words of the pairs, of which the last is nobody's input there.
"""

import numpy as np

from effarch.data.tasks import rows


class InContextRecall:
    """Words 0 ... W-1, keys below W/2."""

    groups = ()

    def __init__(self, seq_len: int, *, vocab_size: int = 16):
        _check(seq_len, "in_context_recall", vocab_size)
        self.seq_len, self.vocab_size = seq_len, vocab_size
        self.noise_words, self.noise_fraction = 0, 0.0

    def draw(self, rng: np.random.Generator, count: int) -> rows.Rows:
        """`count` examples."""
        pairs, words = self.seq_len // 2, self.vocab_size - self.noise_words
        keys_NP = rng.integers(words // 2, size=(count, pairs))
        values_NK = rng.integers(words // 2, words, size=(count, words // 2))
        is_noise_NP = rng.random((count, pairs)) < self.noise_fraction
        is_noise_NP[np.arange(count), rng.integers(pairs - 1, size=count)] = False
        is_noise_NP[:, -1] = False
        probe_N, seen_NP = _last_key(rng, keys_NP, is_noise_NP, words // 2)
        keys_NP[:, -1] = probe_N
        values_NP = np.take_along_axis(values_NK, keys_NP, axis=1)
        pairs_NP2 = np.stack([keys_NP, values_NP], axis=-1)
        if self.noise_words:
            noise_NP2 = rng.integers(words, self.vocab_size, size=pairs_NP2.shape)
            pairs_NP2 = np.where(is_noise_NP[..., None], noise_NP2, pairs_NP2)
        inputs = pairs_NP2.reshape(count, -1)
        targets = np.roll(inputs, -1, axis=1)
        answers = np.zeros(inputs.shape, bool)
        answers[:, ::2] = seen_NP
        trained = np.ones(inputs.shape, bool)
        trained[:, -1] = False
        return rows.Rows(inputs, targets, answers, trained)


class NoisyRecall(InContextRecall):
    """The same with noise: of W words the `noise_words` highest."""

    def __init__(
        self,
        seq_len: int,
        *,
        vocab_size: int = 32,
        noise_words: int = 16,
        noise_fraction: float = 0.2,
    ):
        _check(seq_len, "noisy_recall", vocab_size - noise_words)
        rows.require(noise_words > 0, "noisy_recall.noise_words", noise_words, "must be above 0")
        rows.require(
            0 <= noise_fraction < 1,
            *("noisy_recall.noise_fraction", noise_fraction),
            "must be at least 0 and below 1",
        )
        self.seq_len, self.vocab_size = seq_len, vocab_size
        self.noise_words, self.noise_fraction = noise_words, noise_fraction


def _last_key(rng, keys_NP, is_noise_NP, num_keys: int):
    """A key of the pairs before the last, [N], and which pairs hold a key seen before, [N, P]."""
    count, pairs = keys_NP.shape
    seen_NK = np.zeros((count, num_keys), bool)
    seen_NP = np.zeros((count, pairs), bool)
    everyone = np.arange(count)
    for pair in range(pairs - 1):
        key_N, is_pair_N = keys_NP[:, pair], ~is_noise_NP[:, pair]
        seen_NP[:, pair] = seen_NK[everyone, key_N] & is_pair_N
        seen_NK[everyone, key_N] |= is_pair_N
    seen_NP[:, -1] = True
    return np.argmax(rng.random(seen_NK.shape) * seen_NK, axis=1), seen_NP


def _check(seq_len: int, name: str, words: int) -> None:
    rows.require(words >= 2, f"{name}.vocab_size", words, "leaves no key and value: raise it")
    if seq_len % 2 or seq_len < 4:
        raise ValueError(f"data.seq_len={seq_len} must be even and at least 4 for {name}.")
