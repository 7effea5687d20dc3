"""From rows of a batch to one array over all devices; each process loads only the rows that it holds."""

from collections.abc import Callable, Mapping

import jax
import numpy as np
from jax.sharding import NamedSharding

Rows = Mapping[str, np.ndarray]


class Feeder:
    """Places batches of [batch_size, seq_len] arrays by a sharding of rows and time."""

    def __init__(self, sharding: NamedSharding, batch_size: int, seq_len: int):
        self.sharding, self.shape = sharding, (batch_size, seq_len)
        self._places = {
            device: tuple(part.indices(size)[:2] for part, size in zip(index, self.shape))
            for device, index in sharding.addressable_devices_indices_map(self.shape).items()
        }
        self.spans = _joined(sorted({rows for rows, _ in self._places.values()}))
        """The ranges of rows that this process loads."""

    def __call__(self, load: Callable[[int, int], Rows]) -> dict[str, jax.Array]:
        """`load(start, stop)` gives rows of the global batch: {name: [stop - start, seq_len]}."""
        loaded = {span: load(*span) for span in self.spans}
        names = next(iter(loaded.values())).keys()
        return {
            name: self._array({span: rows[name] for span, rows in loaded.items()}) for name in names
        }

    def _array(self, loaded: dict[tuple[int, int], np.ndarray]) -> jax.Array:
        pieces = []
        for device, ((first, last), (begin, end)) in self._places.items():
            span = next(span for span in loaded if span[0] <= first and last <= span[1])
            rows = loaded[span][first - span[0] : last - span[0], begin:end]
            pieces.append(jax.device_put(rows, device))
        return jax.make_array_from_single_device_arrays(self.shape, self.sharding, pieces)


def _joined(spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Adjacent ranges made one."""
    joined: list[tuple[int, int]] = []
    for start, stop in spans:
        if joined and joined[-1][1] == start:
            joined[-1] = (joined[-1][0], stop)
        else:
            joined.append((start, stop))
    return joined
