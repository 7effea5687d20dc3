import gc
import threading
import time

import pytest

from effarch.data import prefetch


def threads():
    return [thread for thread in threading.enumerate() if thread.name == "effarch-prefetch"]


def test_results_come_in_order_and_ahead_of_need():
    computed = []

    def function(step):
        computed.append(step)
        return step * step

    with prefetch.Prefetch(function, 3, 40, depth=4) as batches:
        assert next(batches) == (3, 9)
        deadline = time.monotonic() + 10
        while len(computed) < 6 and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.05)
        # One taken, four waiting, one in the thread's hand.
        assert computed == [3, 4, 5, 6, 7, 8]
        assert list(batches) == [(step, step * step) for step in range(4, 40)]
    assert not threads()
    assert list(prefetch.Prefetch(function, 5, 5)) == []


def test_an_exception_comes_at_its_step():
    def function(step):
        if step == 2:
            raise OSError("file went away at step 2")
        return step

    batches = prefetch.Prefetch(function, 0, 10)
    assert [next(batches), next(batches)] == [(0, 0), (1, 1)]
    with pytest.raises(OSError, match="file went away at step 2"):
        next(batches)
    with pytest.raises(StopIteration):
        next(batches)
    assert not threads()


def test_closing_stops_the_thread():
    batches = prefetch.Prefetch(lambda step: step, 0, 10**9, depth=2)
    next(batches)
    batches.close()
    batches.close()
    assert not threads()
    assert list(batches) == []


def test_a_forgotten_one_stops():
    batches = prefetch.Prefetch(lambda step: step, 0, 10**9, depth=2)
    next(batches)
    assert len(threads()) == 1
    del batches
    gc.collect()
    deadline = time.monotonic() + 10
    while threads() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not threads()


def test_depth_must_be_positive():
    with pytest.raises(ValueError, match="depth is 0"):
        prefetch.Prefetch(lambda step: step, 0, 1, depth=0)
