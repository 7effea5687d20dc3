"""Batches of a task, as pure functions of a step: what `data/pipeline.py` does for text.

Batch n is drawn from numpy's generator of (seed, training, n), whole, on every host alike; with
`num_examples` > 0 from that many examples, each once an epoch in an order of its own. The examples that
are scored come from a generator of their own, which no seed of a run can meet.

Legend: N examples, B rows of a batch, S tokens of a row.
"""

import functools
import hashlib
import math

import numpy as np

from effarch import names
from effarch.data import tasks
from effarch.data.tasks.rows import Rows

Batch = dict[str, np.ndarray]

_BATCH, _EXAMPLES, _ORDER, _VALIDATION = range(4)


class TaskData:
    """What a run reads where another run reads a prepared folder."""

    tokenizer = None
    metrics = ("accuracy", "exact_match")

    def __init__(self, name: str, task, *, options: dict, num_examples: int, num_validation: int):
        self.name, self.task, self.options = name, task, options
        self.num_examples, self.num_validation = num_examples, num_validation
        self.vocab_size = self.num_words = task.vocab_size
        self.yardsticks: dict[str, float] = {}
        self.sources: tuple[str, ...] = task.groups or (name,)

    @property
    def description(self) -> str:
        """`mqar: vocab_size 8192, num_pairs (8,)`."""
        return f"{self.name}: " + ", ".join(f"{key} {x}" for key, x in self.options.items())

    @functools.cached_property
    def validation(self) -> Rows:
        """The examples that are scored."""
        draw = getattr(self.task, "draw_scored", self.task.draw)
        return draw(_rng(0, _VALIDATION), self.num_validation)

    @functools.cached_property
    def fingerprint(self) -> str:
        """sha256 of the examples that are scored: it changes where the generator does."""
        rows = self.validation
        arrays = [np.asarray(x, np.int32) for x in (rows.inputs, rows.targets, rows.answers)]
        return hashlib.sha256(b"".join(x.tobytes() for x in arrays)).hexdigest()


def open_task(section, *, seq_len: int) -> TaskData:
    """The task that `config.data.task` names. Raises ValueError."""
    constructor = names.lookup(tasks.KINDS, section.name, "data.task.name")
    options = dict(section[section.name])
    return TaskData(
        section.name,
        constructor(seq_len, **options),
        options=options,
        num_examples=section.num_examples,
        num_validation=section.num_validation,
    )


class TrainBatches:
    """Training batches of a task."""

    def __init__(self, data: TaskData, *, batch_size: int, seed: int):
        self.data, self.batch_size, self.seed = data, batch_size, seed
        self._batch = functools.lru_cache(maxsize=2)(self._make)

    def __call__(self, step: int) -> Batch:
        """The whole batch of a step: int32 [B, S], loss_weights float32."""
        return self.rows(step, 0, self.batch_size)

    def rows(self, step: int, start: int, stop: int) -> Batch:
        """Rows [start, stop) of the global batch of a step: what one host loads."""
        return {name: x[start:stop] for name, x in self._batch(step).items()}

    def window_ids(self, step: int) -> list[tuple[str, int, int]]:
        """(task, example, epoch) of each row of a step; examples that never return have epoch 0."""
        drawn = step * self.batch_size + np.arange(self.batch_size)
        if not self.data.num_examples:
            return [(self.data.name, int(number), 0) for number in drawn]
        places = self._places(step)
        epochs = drawn // self.data.num_examples
        return [(self.data.name, int(place), int(n)) for place, n in zip(places, epochs)]

    def _make(self, step: int) -> Batch:
        if not self.data.num_examples:
            return batch_of(self.data.task.draw(_rng(self.seed, _BATCH, step), self.batch_size))
        return {name: x[self._places(step)] for name, x in self._examples.items()}

    @functools.cached_property
    def _examples(self) -> Batch:
        return batch_of(self.data.task.draw(_rng(self.seed, _EXAMPLES), self.data.num_examples))

    def _places(self, step: int) -> np.ndarray:
        drawn = step * self.batch_size + np.arange(self.batch_size)
        epochs, places = np.divmod(drawn, self.data.num_examples)
        orders = {int(epoch): self._order(int(epoch)) for epoch in np.unique(epochs)}
        return np.array([orders[epoch][place] for epoch, place in zip(epochs, places)])

    def _order(self, epoch: int) -> np.ndarray:
        return _rng(self.seed, _ORDER, epoch).permutation(self.data.num_examples)


class ValidationBatches:
    """The examples that are scored; the last batch is filled with empty rows.

    Where the task has groups, `source` int32 [B] is a row's index into `sources`.
    """

    def __init__(self, data: TaskData, *, batch_size: int, max_batches: int = 0):
        """`max_batches` > 0 takes the first so many batches."""
        whole = math.ceil(data.num_validation / batch_size)
        self.sources, self.batch_size = data.sources, batch_size
        self._length = min(whole, max_batches) if max_batches else whole
        rows = data.validation
        self._batch = batch_of(rows, scored=True)
        groups = np.zeros(len(rows.inputs), np.int32) if rows.groups is None else rows.groups
        self._groups = groups.astype(np.int32)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Batch:
        """Batch `index`, always of batch_size rows."""
        return self.rows(index, 0, self.batch_size)

    def rows(self, index: int, start: int, stop: int) -> Batch:
        """Rows [start, stop) of batch `index`: what one host loads."""
        batch = {name: self._take(x, index)[start:stop] for name, x in self._batch.items()}
        return {**batch, "source": self._take(self._groups, index)[start:stop]}

    def scored(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Source and number of targets of each row of batch `index`, [B]."""
        weights_BS = self._take(self._batch["loss_weights"], index)
        return self._take(self._groups, index), weights_BS.sum(axis=1).astype(np.int32)

    def _take(self, x: np.ndarray, index: int) -> np.ndarray:
        if not 0 <= index < len(self):
            raise IndexError(f"validation batch {index} of {len(self)}")
        rows = x[index * self.batch_size : (index + 1) * self.batch_size]
        missing = self.batch_size - len(rows)
        return np.concatenate([rows, np.zeros((missing, *x.shape[1:]), x.dtype)])


def batch_of(rows: Rows, *, scored: bool = False) -> Batch:
    """The batch of some examples, weighted as they are trained on or as they are scored."""
    weights = rows.answers if scored or rows.trained is None else rows.trained
    segment_ids = rows.segment_ids
    if segment_ids is None:
        segment_ids = np.ones(rows.inputs.shape, np.int32)
    return {
        "inputs": rows.inputs.astype(np.int32),
        "targets": np.where(weights, rows.targets, 0).astype(np.int32),
        "segment_ids": segment_ids.astype(np.int32),
        "positions": _positions(segment_ids),
        "loss_weights": weights.astype(np.float32),
    }


def _positions(segment_ids_NS: np.ndarray) -> np.ndarray:
    """Places from 0 in each segment; 0 where there is none."""
    places_S = np.arange(segment_ids_NS.shape[1], dtype=np.int32)
    starts_NS = np.diff(segment_ids_NS, axis=1, prepend=-1) != 0
    first_NS = np.maximum.accumulate(np.where(starts_NS, places_S, 0), axis=1)
    return ((places_S - first_NS) * (segment_ids_NS > 0)).astype(np.int32)


def _rng(seed: int, *stream: int) -> np.random.Generator:
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=stream))
