"""HBM of one device in a step: what the compiler says, split into state and the rest."""

import dataclasses
import math
import re

import jax

from effarch.training import state as state_lib

_UNITS = {"": 1.0, "K": 2.0**10, "M": 2.0**20, "G": 2.0**30, "T": 2.0**40}


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of one device."""

    state: float
    """Parameters, optimizer state and counters, by our shardings."""
    batch: float
    """The other arguments, with what layouts add to the state."""
    temporary: float
    """Activations kept for the backward pass, gradients and workspace."""
    capacity: float

    @property
    def total(self) -> float:
        return self.state + self.batch + self.temporary

    @property
    def fits(self) -> bool:
        return self.total <= self.capacity


def state_bytes(abstract: state_lib.TrainState, shardings: state_lib.TrainState) -> float:
    """Bytes of the state on one device, by the shapes of its shards."""
    return sum(
        math.prod(place.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf, place in zip(jax.tree.leaves(abstract), jax.tree.leaves(shardings))
    )


def read(compiled: jax.stages.Compiled, state: float, capacity: float) -> Memory:
    """The split of a program that was compiled."""
    stats = compiled.memory_analysis()
    new_outputs = stats.output_size_in_bytes - stats.alias_size_in_bytes
    temporary = stats.temp_size_in_bytes + new_outputs
    return Memory(state, stats.argument_size_in_bytes - state, temporary, capacity)


def read_failure(message: str, state: float, capacity: float) -> Memory | None:
    """The split from the compiler's refusal, None if it refused for another reason than HBM."""
    found = re.search(r"required for HLO temporaries \(([\d.]+)([KMGT]?)\)", message)
    if found is None:
        return None
    total = float(found.group(1)) * _UNITS[found.group(2)]  # arguments are part of it
    return Memory(state, 0.0, max(total - state, 0.0), capacity)
