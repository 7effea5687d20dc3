"""Which source the n-th window of a mixture comes from, at any n at once.

grain's `MapDataset.mix` would do, but turns weights into integers with the smallest at 100 and
rounds down: at weights (0.613, 0.387) a source was 37 windows from its share after 20,000
(grain 0.2.18), and with three sources the exact part may be off by more than one. Here every
source stays within one window of weight * n at every n, by the quota method of Balinski and Young
(American Mathematical Monthly 82, 1975), over one period of at most 65536 windows.
"""

import fractions
import heapq
import math
from collections.abc import Sequence

import numpy as np

MAX_PERIOD = 65536
_MAX_DENOMINATOR = 10_000  # a weight such as 0.3 is read as 3/10


class Mixture:
    """An endless interleaving of sources; `weights` need not sum to one, zeros never occur."""

    def __init__(self, weights: Sequence[float]):
        self.parts = integer_parts(weights)
        self.period = sum(self.parts)
        order = _interleave(self.parts)
        self._order = order
        self._before = np.zeros((self.period + 1, len(self.parts)), np.int64)
        np.cumsum(order[:, None] == np.arange(len(self.parts)), axis=0, out=self._before[1:])

    def locate(self, index: int) -> tuple[int, int]:
        """(source, how many windows of that source come before) of window `index`."""
        periods, place = divmod(index, self.period)
        source = int(self._order[place])
        return source, periods * self.parts[source] + int(self._before[place, source])

    def counts(self, length: int) -> list[int]:
        """Windows of each source among the first `length`."""
        periods, place = divmod(length, self.period)
        return [
            periods * part + int(before) for part, before in zip(self.parts, self._before[place])
        ]


def integer_parts(weights: Sequence[float]) -> list[int]:
    """Integers in the proportion of `weights`, with a sum of at most MAX_PERIOD.

    Exact where such integers exist, else the nearest with that sum (a positive weight gets at
    least one part).
    """
    exact = [fractions.Fraction(weight).limit_denominator(_MAX_DENOMINATOR) for weight in weights]
    if all((part > 0) == (weight > 0) for part, weight in zip(exact, weights)):
        scale = math.lcm(*(part.denominator for part in exact))
        parts = [int(part * scale) for part in exact]
        parts = [part // math.gcd(*parts) for part in parts]
        if sum(parts) <= MAX_PERIOD:
            return parts
    total = math.fsum(weights)
    shares = [MAX_PERIOD * weight / total for weight in weights]
    parts = [max(int(share), 1) if share > 0 else 0 for share in shares]
    # The largest remainders get what rounding down left over.
    missing = MAX_PERIOD - sum(parts)
    remainders = sorted(range(len(parts)), key=lambda i: parts[i] - shares[i])
    for index in remainders[: max(missing, 0)]:
        parts[index] += 1
    return parts


def _interleave(parts: Sequence[int]) -> np.ndarray:
    """One period: source of each place, |count_j(n) - n parts_j / period| < 1 at every n."""
    period = sum(parts)
    order = np.empty(period, np.int32)
    counts = [0] * len(parts)
    # Window c of source j may stand from place floor(c period / p_j) on and must stand before
    # place ceil((c + 1) period / p_j): of those that may come, take the one due first.
    waiting = [(0, source) for source, part in enumerate(parts) if part]
    heapq.heapify(waiting)
    ready: list[tuple[int, int]] = []
    for place in range(period):
        while waiting and waiting[0][0] <= place:
            source = heapq.heappop(waiting)[1]
            due = -(-(counts[source] + 1) * period // parts[source])
            heapq.heappush(ready, (due, source))
        source = heapq.heappop(ready)[1]
        order[place] = source
        counts[source] += 1
        heapq.heappush(waiting, (counts[source] * period // parts[source], source))
    return order
