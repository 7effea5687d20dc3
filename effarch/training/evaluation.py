"""Loss and bits per byte of held-out text."""

import functools
import math

import jax
import numpy as np

from effarch.data import pipeline
from effarch.training.setup import Setup


def batches(setup: Setup, *, max_batches: int = 0) -> pipeline.ValidationBatches:
    """The validation windows of a run; `max_batches` 0 takes all."""
    return pipeline.ValidationBatches(
        setup.dataset,
        batch_size=setup.config.data.batch_size,
        seq_len=setup.config.data.seq_len,
        max_batches=max_batches,
    )


def evaluate(setup: Setup, eval_step, params, model_state, windows) -> dict[str, float]:
    """`loss` (nats a token) and `bits_per_byte` of all windows, and of each source if several.

    Bits per byte: summed loss / (ln 2 x UTF-8 bytes of the text that was scored).
    """
    sums = []
    for index in range(len(windows)):
        batch = setup.feeder(functools.partial(_rows, windows, index))
        sums.append((eval_step(params, model_state, batch), *windows.scored(index)))
    names = setup.dataset.sources
    loss, tokens = np.zeros(len(names)), np.zeros(len(names))
    for row_loss, source, weight in sums:
        np.add.at(loss, source, np.asarray(jax.device_get(row_loss), np.float64))
        np.add.at(tokens, source, weight)
    num_bytes = np.array([windows.bytes_of(name) for name in names], np.float64)
    result = _figures(loss.sum(), tokens.sum(), num_bytes.sum())
    if len(names) > 1:
        for index, name in enumerate(names):
            if tokens[index]:
                figures = _figures(loss[index], tokens[index], num_bytes[index])
                result |= {f"{name}/{key}": value for key, value in figures.items()}
    return result


def _rows(windows, index: int, start: int, stop: int) -> dict[str, np.ndarray]:
    return {name: x for name, x in windows.rows(index, start, stop).items() if x.ndim == 2}


def _figures(loss: float, tokens: float, num_bytes: float) -> dict[str, float]:
    if not tokens:
        raise ValueError(
            "data.val_permille leaves no validation text; raise it or set eval.every_steps=0."
        )
    return {
        "loss": float(loss / tokens),
        "bits_per_byte": float(loss / (math.log(2) * num_bytes)),
        "tokens": int(tokens),
        "bytes": int(num_bytes),
    }
