"""Batches of a prepared folder, as pure functions of a step.

Window i of a stream is tokens[i S : i S + S + 1]: its first S tokens are inputs, its last S
targets. Segments begin at document tokens (and at the window's start), numbered from 1; positions
count from 0 in each segment. Packing wastes nothing; a document may be cut at a window's edge.

Training draws windows of each source in grain's shuffled order, a new permutation every epoch, and
interleaves sources by weight. Row r of step n is window n * batch_size + r of that sequence, on any
number of hosts: the position of a run is one integer, the step.

Legend: B rows, S tokens of a window.
"""

import hashlib
import math
from collections.abc import Sequence

import grain
import numpy as np
from absl import logging

from effarch import names as names_lib
from effarch.data import mixture
from effarch.data.dataset import Dataset

Batch = dict[str, np.ndarray]

MAX_EPOCHS = 4  # repeating a text more often is worth little (Muennighoff et al., arXiv:2305.16264)


def windows_in(num_tokens: int, seq_len: int) -> int:
    """Full windows of a stream: the last token is only a target."""
    return max(num_tokens - 1, 0) // seq_len


def window_batch(tokens_BS1: np.ndarray, document_token: int) -> Batch:
    """The batch of full windows [B, S+1]."""
    inputs_BS = np.ascontiguousarray(tokens_BS1[:, :-1], np.int32)
    starts_BS = inputs_BS == document_token
    starts_BS[:, 0] = True
    places_S = np.arange(inputs_BS.shape[1], dtype=np.int32)
    last_start_BS = np.maximum.accumulate(np.where(starts_BS, places_S, 0), axis=1)
    return {
        "inputs": inputs_BS,
        "targets": np.ascontiguousarray(tokens_BS1[:, 1:], np.int32),
        "segment_ids": np.cumsum(starts_BS, axis=1, dtype=np.int32),
        "positions": places_S - last_start_BS,
        "loss_weights": np.ones(inputs_BS.shape, np.float32),
    }


class TrainBatches:
    """Training batches; `weights` are token fractions of the sources, () means by token count.

    A weight of 0 leaves a source out. Weights need not sum to one.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        batch_size: int,
        seq_len: int,
        seed: int,
        weights: Sequence[float] = (),
    ):
        _check_sizes(batch_size, seq_len)
        self.dataset = dataset
        self.batch_size = batch_size
        self.seq_len = seq_len
        tokens = {source: dataset.count(source, "train") for source in dataset.sources}
        weights = _check_weights(weights, dataset.sources) or tuple(tokens.values())
        self.windows = {name: windows_in(count, seq_len) for name, count in tokens.items()}
        for source, weight in zip(dataset.sources, weights):
            if weight > 0 and self.windows[source] == 0:
                raise ValueError(
                    f"seq_len {seq_len} is longer than the training text of source {source!r} "
                    f"({tokens[source] - 1} tokens after the first): use a shorter seq_len, more "
                    "text, or weight 0 for this source."
                )
        self._mixture = mixture.Mixture(weights)
        self._shuffled = {
            source: grain.MapDataset.source(range(count))
            .seed(_source_seed(seed, source))
            .shuffle()
            .repeat(None, reseed_each_epoch=True)
            for source, count in self.windows.items()
            if count
        }
        self._warned: set[str] = set()

    def __call__(self, step: int) -> Batch:
        """The whole batch of a step: int32 [B, S], loss_weights float32."""
        return self.rows(step, 0, self.batch_size)

    def rows(self, step: int, start: int, stop: int) -> Batch:
        """Rows [start, stop) of the global batch of a step: what one host loads."""
        drawn = self._draw(step, start, stop)
        tokens_BS1 = np.empty((len(drawn), self.seq_len + 1), np.int32)
        for row, (source, window, epoch) in enumerate(drawn):
            begin = window * self.seq_len
            stream = self.dataset.tokens(source, "train")
            tokens_BS1[row] = stream[begin : begin + self.seq_len + 1]
            if epoch >= MAX_EPOCHS:
                self._warn(source, step)
        return window_batch(tokens_BS1, self.dataset.document_token)

    def window_ids(self, step: int) -> list[tuple[str, int, int]]:
        """(source, window, epoch) of each row of a step; epochs count from 0."""
        return self._draw(step, 0, self.batch_size)

    def epochs(self, step: int) -> dict[str, float]:
        """How often each source's windows have been read by the first `step` batches."""
        counts = self._mixture.counts(step * self.batch_size)
        windows = self.windows.items()
        return {name: count / max(total, 1) for (name, total), count in zip(windows, counts)}

    def _draw(self, step: int, start: int, stop: int) -> list[tuple[str, int, int]]:
        if step < 0 or not 0 <= start <= stop <= self.batch_size:
            raise ValueError(
                f"rows: step {step}, rows [{start}, {stop}) do not lie in a batch of "
                f"{self.batch_size}: give step >= 0 and 0 <= start <= stop <= batch_size."
            )
        first = step * self.batch_size
        drawn = []
        for index in range(first + start, first + stop):
            number, ordinal = self._mixture.locate(index)
            source = self.dataset.sources[number]
            window = int(self._shuffled[source][ordinal])
            drawn.append((source, window, ordinal // self.windows[source]))
        return drawn

    def _warn(self, source: str, step: int) -> None:
        if source not in self._warned:
            self._warned.add(source)
            logging.warning(
                "Source %r has been read %d times by step %d: more text, or a smaller weight for "
                "it, would serve the run better.",
                source,
                MAX_EPOCHS,
                step,
            )


class ValidationBatches:
    """All validation windows of some sources, one source after the other; disjoint, each once.

    A stream's last window is padded: inputs are the document token, segment 0, weight 0. The last
    batch is filled with such rows. `max_batches` > 0 takes that many batches of windows, spread
    evenly. Batches hold one more entry, `source` int32 [B]: the row's index into `sources`.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        batch_size: int,
        seq_len: int,
        max_batches: int = 0,
        sources: Sequence[str] = (),
    ):
        _check_sizes(batch_size, seq_len)
        if max_batches < 0:
            raise ValueError(f"max_batches is {max_batches}: give 0 (all) or a positive number.")
        self.dataset = dataset
        self.batch_size = batch_size
        self.seq_len = seq_len
        self.sources = _known_sources(sources, dataset.sources)
        windows_by_source = [
            -(-(dataset.count(source, "val") - 1) // seq_len) for source in self.sources
        ]
        total = sum(windows_by_source)
        if total == 0:
            permille = dataset.meta["split"]["val_permille"]
            raise ValueError(
                f"sources {self.sources} hold no validation text (val_permille {permille}): "
                "prepare with a larger val_permille or more documents."
            )
        kept = min(total, max_batches * batch_size) if max_batches else total
        self._is_whole = kept == total
        chosen = np.arange(kept) * total // kept  # evenly spread; all of them if kept == total
        first = np.concatenate([[0], np.cumsum(windows_by_source)])
        self._source = (np.searchsorted(first, chosen, side="right") - 1).astype(np.int32)
        self._window = chosen - first[self._source]
        self._bytes: dict[int, int] = {}

    def __len__(self) -> int:
        return math.ceil(len(self._window) / self.batch_size)

    def __getitem__(self, index: int) -> Batch:
        """Batch `index`, always of batch_size rows."""
        return self.rows(index, 0, self.batch_size)

    def rows(self, index: int, start: int, stop: int) -> Batch:
        """Rows [start, stop) of batch `index`: what one host loads."""
        tokens_BS1 = np.full(
            (stop - start, self.seq_len + 1), self.dataset.document_token, np.int32
        )
        for row, place in enumerate(self._places(index)[start:stop]):
            tokens = self._window_tokens(place)
            tokens_BS1[row, : len(tokens)] = tokens
        source_B, lengths_B = (x[start:stop] for x in self.scored(index))
        batch = window_batch(tokens_BS1, self.dataset.document_token)
        is_real_BS = np.arange(self.seq_len) < lengths_B[:, None]
        # Inputs are right already: a stream's last token is a document token.
        for name in ("segment_ids", "positions", "loss_weights"):
            batch[name] *= is_real_BS.astype(batch[name].dtype)
        return {**batch, "source": source_B}

    def scored(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Source and number of targets of each row of batch `index`, [B] int32; reads no text."""
        source_B, lengths_B = np.zeros((2, self.batch_size), np.int32)
        for row, place in enumerate(self._places(index)):
            source_B[row] = self._source[place]
            lengths_B[row] = len(self._window_tokens(place)) - 1
        return source_B, lengths_B

    def _places(self, index: int) -> range:
        """The windows of a batch, by their place among the chosen ones."""
        if not 0 <= index < len(self):
            raise IndexError(f"validation batch {index} of {len(self)}")
        first = index * self.batch_size
        return range(first, min(first + self.batch_size, len(self._window)))

    def bytes_of(self, source: str | int) -> int:
        """UTF-8 bytes of the scored targets of a source (the document token counts as none).

        Bits per byte = sum of loss * loss_weights over the source's rows / (ln 2 * bytes).
        Tokenizers that are not byte-level know bytes of a token only nearly: a cut set is then
        scaled so that the whole stream would come out exactly.
        """
        number = self.sources.index(source) if isinstance(source, str) else source
        if number not in self._bytes:
            self._bytes[number] = self._count_bytes(number)
        return self._bytes[number]

    def _count_bytes(self, number: int) -> int:
        source = self.sources[number]
        whole = self.dataset.count(source, "val", "bytes")
        if self._is_whole:
            return whole
        places = np.flatnonzero(self._source == number)
        counted = sum(self._bytes_in(self._window_tokens(place)[1:]) for place in places)
        if self.dataset.tokenizer.is_exact:
            return counted
        tokens = self.dataset.tokens(source, "val")
        pieces = np.array_split(tokens, -(-len(tokens) // 2**20))
        return round(counted * whole / max(sum(map(self._bytes_in, pieces)), 1))

    def _bytes_in(self, tokens: np.ndarray) -> int:
        return int(self.dataset.tokenizer.byte_lengths[tokens].sum(dtype=np.int64))

    def _window_tokens(self, place: int) -> np.ndarray:
        stream = self.dataset.tokens(self.sources[self._source[place]], "val")
        begin = self._window[place] * self.seq_len
        return stream[begin : begin + self.seq_len + 1]


def _source_seed(seed: int, source: str) -> int:
    """A 32-bit seed of its own for each source: adding a source leaves the others' order."""
    digest = hashlib.blake2b(f"{seed}/{source}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big")


def _check_sizes(batch_size: int, seq_len: int) -> None:
    for name, value in (("batch_size", batch_size), ("seq_len", seq_len)):
        if value < 1:
            raise ValueError(f"{name} is {value}: give a positive number.")


def _check_weights(weights: Sequence[float], names: Sequence[str]) -> tuple[float, ...]:
    weights = tuple(map(float, weights))
    if weights and len(weights) != len(names):
        raise ValueError(
            f"weights {weights} has {len(weights)} entries for {len(names)} source(s) "
            f"({', '.join(names)}): give one weight a source, or none for proportional to tokens."
        )
    if weights and not (
        all(math.isfinite(weight) and weight >= 0 for weight in weights) and sum(weights) > 0
    ):
        raise ValueError(
            f"weights {weights} must be finite, not negative and not all zero: they are the "
            f"fractions of tokens from {', '.join(names)}."
        )
    return weights


def _known_sources(wanted: Sequence[str], known: Sequence[str]) -> tuple[str, ...]:
    for source in wanted:
        if source not in known:
            raise ValueError(
                f"sources: {source!r} is not in the prepared folder. "
                f"{names_lib.did_you_mean(source, known)}"
            )
    return tuple(wanted) or tuple(known)
