"""Computes the batches of the coming steps in a thread."""

import queue
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

_POLL_SECONDS = 0.1


class Prefetch:
    """Iterates (step, function(step)) for start <= step < stop, up to `depth` results ahead.

    An exception in `function` is raised by the `next` that would have given that step. Leave by
    exhaustion, `close()` or `with`; a forgotten one stops its thread when it is collected.
    """

    def __init__(self, function: Callable[[int], Any], start: int, stop: int, depth: int = 4):
        if depth < 1:
            raise ValueError(f"depth is {depth}: give the number of batches ahead, at least 1.")
        self._results: queue.Queue = queue.Queue(depth)
        self._closing = threading.Event()
        self._left = max(stop - start, 0)
        self._thread = threading.Thread(
            target=_compute,
            args=(function, start, stop, self._results, self._closing),
            name="effarch-prefetch",
            daemon=True,
        )
        weakref.finalize(self, self._closing.set)
        self._thread.start()

    def __iter__(self) -> Iterator[tuple[int, Any]]:
        return self

    def __next__(self) -> tuple[int, Any]:
        if self._left == 0 or self._closing.is_set():
            self.close()
            raise StopIteration
        step, result, error = self._results.get()
        self._left -= 1
        if error is not None:
            self.close()
            raise error
        return step, result

    def __enter__(self) -> "Prefetch":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def close(self) -> None:
        """Stops the thread and waits for it; the result it is computing is dropped."""
        self._closing.set()
        self._thread.join()


def _compute(
    function: Callable[[int], Any],
    start: int,
    stop: int,
    results: queue.Queue,
    closing: threading.Event,
) -> None:
    for step in range(start, stop):
        try:
            entry = (step, function(step), None)
        except BaseException as error:  # whatever it is, it belongs to the reader
            entry = (step, None, error)
        if not _put(results, entry, closing) or entry[2] is not None:
            return


def _put(results: queue.Queue, entry: tuple, closing: threading.Event) -> bool:
    """Puts unless closing; False if closing."""
    while not closing.is_set():
        try:
            results.put(entry, timeout=_POLL_SECONDS)
            return True
        except queue.Full:
            continue
    return False
