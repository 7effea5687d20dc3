"""Examples of a task, and draws that several tasks share.

Legend: N examples, S tokens of a row.
"""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Rows:
    """N examples as a task draws them."""

    inputs: np.ndarray
    """[N, S] words."""
    targets: np.ndarray
    """[N, S] the word due after each token; where nothing is due, anything."""
    answers: np.ndarray
    """[N, S] bool: what is scored."""
    trained: np.ndarray | None = None
    """[N, S] bool: what is trained on; None is the answers."""
    segment_ids: np.ndarray | None = None
    """[N, S] from 1, 0 is padding; None is one segment."""
    groups: np.ndarray | None = None
    """[N] index into the task's `groups`; None is the first."""


def distinct(rng: np.random.Generator, count: int, total: int, num: int) -> np.ndarray:
    """[count, num] numbers below `total`, in each row without repeats, in random order."""
    return first_places(rng.random((count, total)), num)


def first_places(values_NM: np.ndarray, num: int) -> np.ndarray:
    """[N, num] the places of the smallest values of each row, the smallest first."""
    if num < values_NM.shape[1]:
        places = np.argpartition(values_NM, num - 1, axis=1)[:, :num]
    else:
        places = np.broadcast_to(np.arange(num), values_NM.shape)
    order = np.argsort(np.take_along_axis(values_NM, places, axis=1), axis=1)
    return np.take_along_axis(places, order, axis=1)


def require(holds: bool, field: str, value, remedy: str) -> None:
    """A ValueError of one sentence for an option of a task."""
    if not holds:
        raise ValueError(f"data.task.{field}={value!r} {remedy}.")
