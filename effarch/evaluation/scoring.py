"""The three computations that evaluation suites ask of a language model, on the model of a run.

Every sequence begins with the document token, as in training. Sequences are sorted by length and padded
to powers of two, so that few shapes are compiled; results come in the order of the requests.
"""

import functools
import itertools
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from effarch.models import decoding
from effarch.parallel import feeding
from effarch.training import restore, setup
from effarch.training import step as step_lib
from effarch.training.state import TrainState

SHORTEST = 32
"""Tokens of the shortest padded row."""
CHECK_EVERY = 8
"""Tokens between looks for a stop string."""


class _Scored(NamedTuple):
    """Tokens of a row, of which the last `num_scored` are scored."""

    tokens: np.ndarray
    num_scored: int


class Scorer:
    """A model with its tokenizer.

    Args:
      plan, state: of a run that learned text (`restore.open_run`).
      max_length: tokens that the model sees at most; None: as many as it was trained on.
      batch_size: rows of one call.
    """

    def __init__(
        self,
        plan: setup.Setup,
        state: TrainState,
        *,
        max_length: int | None = None,
        batch_size: int = 16,
    ):
        if plan.dataset.tokenizer is None:
            raise ValueError("the run learned a task, not text; evaluate a run with a tokenizer.")
        self.tokenizer = plan.dataset.tokenizer
        self.max_length = max_length or plan.config.data.seq_len
        self.batch_size = batch_size
        self._plan, self._state = plan, state
        self._eval_step = plan.eval_step(quantized=plan.is_model_quantized(int(state.step)))

    @classmethod
    def of_run(cls, folder: pathlib.Path | str, *, step: int | None = None, **options) -> "Scorer":
        """The model of a run folder. Raises ValueError if there is none."""
        return cls(*restore.open_run(pathlib.Path(folder), step=step), **options)

    def loglikelihood(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
        """Of each (context, continuation): log p(continuation | context) in nats, and whether every
        token of the continuation is the model's best.

        Both are cut from one tokenization of the whole; spaces that end the context go to the
        continuation. A row that is too long loses its beginning.
        """
        return [
            (-loss, exact)
            for loss, exact in self._score([self._pair(context, rest) for context, rest in pairs])
        ]

    def loglikelihood_rolling(self, texts: Sequence[str]) -> list[float]:
        """log p of each text in nats; every token is scored once.

        A long text is cut into windows of `max_length`; the last one looks back as far as it can.
        """
        windows = [list(self._windows(text)) for text in texts]
        scores = iter(self._score([row for rows in windows for row in rows]))
        return [-sum(next(scores)[0] for _ in rows) for rows in windows]

    def generate_until(self, requests: Sequence[tuple[str, Mapping[str, Any]]]) -> list[str]:
        """A continuation of each context, up to a stop string, which is left out.

        The options of a request: `until` (a string or several), `max_gen_toks` (256), `do_sample`
        (False: greedy), `temperature`, `top_p`, `top_k`. A document token ends every continuation.
        """
        grouped: dict[tuple, list[int]] = {}
        for index, (_, options) in enumerate(requests):
            grouped.setdefault(_generation(options), []).append(index)
        texts = [""] * len(requests)
        for options, indices in grouped.items():
            for start in range(0, len(indices), self.batch_size):
                batch = indices[start : start + self.batch_size]
                contexts = [requests[index][0] for index in batch]
                for index, text in zip(batch, self._continue(contexts, *options)):
                    texts[index] = text
        return texts

    def _pair(self, context: str, continuation: str) -> _Scored:
        spaces = len(context) - len(context.rstrip())
        if spaces:
            context, continuation = context[:-spaces], context[-spaces:] + continuation
        whole, known = self.tokenizer.encode_batch([context + continuation, context])
        num_scored = max(len(whole) - len(known), 0)
        return self._row(whole, num_scored)

    def _row(self, tokens: np.ndarray, num_scored: int) -> _Scored:
        tokens = np.concatenate([[self.tokenizer.document_token], tokens]).astype(np.int32)
        return _Scored(tokens[-(self.max_length + 1) :], min(num_scored, self.max_length))

    def _windows(self, text: str) -> Iterator[_Scored]:
        tokens = self.tokenizer.encode(text)
        for start in range(0, len(tokens), self.max_length):
            stop = min(start + self.max_length, len(tokens))
            yield self._row(tokens[:stop], stop - start)

    def _score(self, rows: Sequence[_Scored]) -> list[tuple[float, bool]]:
        """The summed cross-entropy of each row, and whether all of its scored tokens are hits."""
        found: list[tuple[float, bool]] = [(0.0, True)] * len(rows)
        order = sorted(range(len(rows)), key=lambda index: -len(rows[index].tokens))
        for length, group in itertools.groupby(order, key=lambda i: _padded(rows[i].tokens.size)):
            indices = list(group)
            for start in range(0, len(indices), self.batch_size):
                batch = indices[start : start + self.batch_size]
                result = self._call([rows[index] for index in batch], length)
                for place, index in enumerate(batch):
                    if rows[index].num_scored:
                        loss, exact = float(result["loss"][place]), bool(result["exact"][place])
                        found[index] = (loss, exact)
        return found

    def _call(self, rows: Sequence[_Scored], length: int) -> dict[str, np.ndarray]:
        shape = (self.batch_size, length)
        names = ("inputs", "targets", "segment_ids", "positions")
        batch = {name: np.zeros(shape, np.int32) for name in names}
        batch["loss_weights"] = np.zeros(shape, np.float32)
        for place, (tokens, num_scored) in enumerate(rows):
            size = len(tokens) - 1
            batch["inputs"][place, :size], batch["targets"][place, :size] = tokens[:-1], tokens[1:]
            batch["segment_ids"][place, :size] = 1
            batch["positions"][place, :size] = np.arange(size)
            batch["loss_weights"][place, size - num_scored : size] = 1
        feeder = feeding.Feeder(self._plan.layout.sharding(step_lib.BATCH_AXES), *shape)
        placed = feeder(functools.partial(_rows_of, batch))
        return jax.device_get(self._eval_step(self._state.params, self._state.model_state, placed))

    @functools.cached_property
    def _model(self):
        return restore.model_of(self._plan, self._state)

    def _continue(self, contexts, until, max_tokens, temperature, top_k, top_p) -> list[str]:
        room = max(self.max_length - max_tokens, 1)
        prompts = [
            self._row(ids, 0).tokens[-room:] for ids in self.tokenizer.encode_batch(contexts)
        ]
        options = dict(temperature=temperature, top_k=top_k, top_p=top_p)
        columns: list[np.ndarray] = []
        texts = [""] * len(contexts)
        for drawn in decoding.generate(self._model, prompts, max_tokens=max_tokens, **options):
            columns.append(drawn)
            if len(columns) % CHECK_EVERY == 0 or len(columns) == max_tokens:
                ended = []
                for row in range(len(contexts)):
                    texts[row], is_over = self._cut([int(c[row]) for c in columns], until)
                    ended.append(is_over)
                if all(ended):
                    break
        return texts

    def _cut(self, ids: list[int], until: tuple[str, ...]) -> tuple[str, bool]:
        """The text before the first stop, and whether there was one."""
        document = self.tokenizer.document_token
        is_over = document in ids
        text = self.tokenizer.decode(ids[: ids.index(document)] if is_over else ids)
        ends = [text.index(stop) for stop in until if stop in text]
        return (text[: min(ends)], True) if ends else (text, is_over)


def _generation(options: Mapping[str, Any]) -> tuple:
    """(until, max_tokens, temperature, top_k, top_p), hashable."""
    until = options.get("until") or ()
    until = (until,) if isinstance(until, str) else tuple(until)
    sampled = options.get("do_sample", False)
    return (
        tuple(stop for stop in until if stop),
        int(options.get("max_gen_toks", 256)),
        float(options.get("temperature", 1.0)) if sampled else 0.0,
        int(options.get("top_k", 0)) if sampled else 0,
        float(options.get("top_p", 1.0)) if sampled else 1.0,
    )


def _padded(num_tokens: int) -> int:
    """Inputs of a row of so many tokens, rounded up to a power of two."""
    length = SHORTEST
    while length < num_tokens - 1:
        length *= 2
    return length


def _rows_of(batch: dict[str, np.ndarray], start: int, stop: int) -> dict[str, np.ndarray]:
    return {name: array[start:stop] for name, array in batch.items()}
