"""From logical axes to mesh axes: the one table that says what is split over what."""

import dataclasses
import math
from collections.abc import Sequence

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

RULES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("batch", ("data", "fsdp", "expert")),
    ("time", ("context",)),
    ("embed", ("fsdp",)),
    ("vocab", ("tensor",)),
    ("heads", ("tensor",)),
    ("ffn", ("tensor",)),
    ("experts", ("expert",)),
)
"""(logical axis, mesh axes). Axes that are not named stay whole."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """A mesh and the rules that place logical axes on it."""

    mesh: Mesh
    rules: tuple[tuple[str, tuple[str, ...]], ...] = RULES

    def spec(self, logical: Sequence[str | None]) -> PartitionSpec:
        """Mesh axes of each dimension; a mesh axis serves the first dimension that asks for it."""
        return PartitionSpec(*(mesh_axes or None for mesh_axes in self._mesh_axes(logical)))

    def _mesh_axes(self, logical: Sequence[str | None]) -> list[tuple[str, ...]]:
        table, used, found = dict(self.rules), set(), []
        for axis in logical:
            mesh_axes = tuple(name for name in table.get(axis, ()) if name not in used)
            used.update(mesh_axes)
            found.append(mesh_axes)
        return found

    def sharding(self, logical: Sequence[str | None]) -> NamedSharding:
        """Where an array with these logical axes lies."""
        return NamedSharding(self.mesh, self.spec(logical))

    def constrain(self, x: Array, logical: Sequence[str | None]) -> Array:
        """Asks the partitioner to lay x out by its logical axes."""
        if self.mesh.size == 1:
            return x
        return jax.lax.with_sharding_constraint(x, self.sharding(logical))

    def check(self, name: str, shape: Sequence[int], logical: Sequence[str | None]) -> None:
        """Raises ValueError, naming array and axis, if a dimension cannot be split evenly."""
        for size, axis, mesh_axes in zip(shape, logical, self._mesh_axes(logical)):
            parts = math.prod(self.mesh.shape[mesh_axis] for mesh_axis in mesh_axes)
            if size % parts:
                names = " x ".join(mesh_axes)
                raise ValueError(
                    f"{name}: its {axis!r} axis of {size} cannot be split over the {parts} parts of "
                    f"mesh axis {names}; change that size, or mesh.{mesh_axes[-1]}."
                )
