"""Loss on held-out text or examples, and the metrics that their source names."""

import functools
import math

import jax
import numpy as np

from effarch.data import batches as batches_lib
from effarch.training.setup import Setup

METRICS = {
    "bits_per_byte": lambda sums: sums["loss"] / (math.log(2) * sums["bytes"]),
    "accuracy": lambda sums: sums["hits"] / sums["tokens"],
    "exact_match": lambda sums: sums["exact"] / sums["rows"],
}
"""bits_per_byte: summed loss / (ln 2 x UTF-8 bytes of the text that was scored); accuracy: scored
tokens that no other word beats; exact_match: rows without a miss."""


def batches(setup: Setup, *, max_batches: int = 0):
    """What a run is scored on; `max_batches` 0 takes all."""
    return batches_lib.validation(setup.dataset, setup.config.data, max_batches=max_batches)


def evaluate(setup: Setup, eval_step, params, model_state, windows) -> dict[str, float]:
    """`loss` (nats a token) and the source's metrics over all windows, and of each part if several."""
    found = []
    for index in range(len(windows)):
        batch = setup.feeder(functools.partial(_rows, windows, index))
        found.append((eval_step(params, model_state, batch), *windows.scored(index)))
    parts = setup.dataset.sources
    sums = {name: np.zeros(len(parts)) for name in ("loss", "hits", "exact", "tokens", "rows")}
    for by_row, part, tokens in found:
        values = jax.device_get(by_row) | {"tokens": tokens, "rows": tokens > 0}
        for name, value in values.items():
            np.add.at(sums[name], part, np.asarray(value, np.float64))
    if "bits_per_byte" in setup.dataset.metrics:
        sums["bytes"] = np.array([windows.bytes_of(part) for part in parts], np.float64)
    result = _figures(setup, {name: x.sum() for name, x in sums.items()})
    if len(parts) > 1:
        for index, part in enumerate(parts):
            if sums["tokens"][index]:
                figures = _figures(setup, {name: x[index] for name, x in sums.items()})
                result |= {f"{part}/{name}": value for name, value in figures.items()}
    return result


def _rows(windows, index: int, start: int, stop: int) -> dict[str, np.ndarray]:
    return {name: x for name, x in windows.rows(index, start, stop).items() if x.ndim == 2}


def _figures(setup: Setup, sums: dict[str, float]) -> dict[str, float]:
    if not sums["tokens"]:
        raise ValueError(
            "data.val_permille leaves no validation text; raise it or set eval.every_steps=0."
        )
    figures = {"loss": float(sums["loss"] / sums["tokens"])}
    figures |= {name: float(METRICS[name](sums)) for name in setup.dataset.metrics}
    return figures | {name: int(sums[name]) for name in ("tokens", "bytes") if name in sums}
