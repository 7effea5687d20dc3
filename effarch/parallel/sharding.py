"""From logical axes to mesh axes: the one table that says what is split over what."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from effarch import names
from effarch.parallel import mesh as mesh_lib

Logical = Sequence[str | None]

RULES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("batch", ("data", "fsdp", "expert")),
    ("time", ("context",)),
    ("stream", ("context", "tensor")),
    ("embed", ("fsdp",)),
    ("vocab", ("tensor",)),
    ("heads", ("tensor",)),
    ("ffn", ("tensor",)),
    ("experts", ("expert",)),
)
"""(logical axis, mesh axes). Axes that are not named stay whole. `stream` is time between blocks, where
norms and residuals are shared out over the devices that hold different heads and channels."""


def rules(changes: Sequence[str] = ()) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """The table with changes such as `stream=context`, `ffn=tensor+expert` or `embed=` (whole)."""
    table = dict(RULES)
    for change in changes:
        logical, equals, axes = change.partition("=")
        if not equals:
            raise ValueError(
                f"mesh.rules: {change!r} must be LOGICAL=AXIS+AXIS, as in 'ffn=tensor'."
            )
        names.lookup(table, logical.strip(), "mesh.rules: logical axis")
        wanted = [axis.strip() for axis in axes.split("+") if axis.strip()]
        for axis in wanted:
            names.lookup(dict.fromkeys(mesh_lib.AXES), axis, "mesh.rules: mesh axis")
        table[logical.strip()] = tuple(wanted)
    return tuple(table.items())


@dataclasses.dataclass(frozen=True)
class Layout:
    """A mesh and the rules that place logical axes on it."""

    mesh: Mesh
    rules: tuple[tuple[str, tuple[str, ...]], ...] = RULES

    def spec(self, logical: Logical) -> PartitionSpec:
        """Mesh axes of each dimension; a mesh axis serves the first dimension that asks for it."""
        return PartitionSpec(*(mesh_axes or None for mesh_axes in self.mesh_axes(logical)))

    def mesh_axes(self, logical: Logical) -> list[tuple[str, ...]]:
        """The mesh axes over which each dimension is split."""
        table, used, found = dict(self.rules), set(), []
        for axis in logical:
            mesh_axes = tuple(name for name in table.get(axis, ()) if name not in used)
            used.update(mesh_axes)
            found.append(mesh_axes)
        return found

    def sharding(self, logical: Logical) -> NamedSharding:
        """Where an array with these logical axes lies."""
        return NamedSharding(self.mesh, self.spec(logical))

    def constrain(self, x: Array, logical: Logical) -> Array:
        """Asks the partitioner to lay x out by its logical axes."""
        if self.mesh.size == 1:
            return x
        return jax.lax.with_sharding_constraint(x, self.sharding(logical))

    def local(
        self,
        function: Callable,
        arrays: Sequence[Array | None],
        inputs: Sequence[Logical],
        outputs: Sequence[Logical],
        checked: bool = True,
    ) -> tuple[Array, ...]:
        """`function(*arrays)` on each device's own pieces, for what needs no word from other devices.

        `inputs` and `outputs` are the logical axes of the arrays (None stays None) and of the results.
        `checked` False: kernels of others, which do not say over which axes their results vary, may run.
        """
        given = [index for index, array in enumerate(arrays) if array is not None]

        def on_pieces(*pieces):
            whole = dict(zip(given, pieces))
            return function(*(whole.get(index) for index in range(len(arrays))))

        return jax.shard_map(
            on_pieces,
            mesh=self.mesh,
            in_specs=tuple(self.spec(inputs[index]) for index in given),
            out_specs=tuple(self.spec(logical) for logical in outputs),
            check_vma=checked,
        )(*(arrays[index] for index in given))

    def parts(self, *logical: str) -> int:
        """How many pieces an array of these logical axes is cut into."""
        axes = itertools.chain.from_iterable(self.mesh_axes(logical))
        return math.prod(self.mesh.shape[axis] for axis in axes)

    def check(
        self,
        name: str,
        shape: Sequence[int],
        logical: Logical,
        units: Sequence[int] | None = None,
    ) -> None:
        """Raises ValueError, naming array and axis, if a dimension cannot be split evenly.

        `units`: the sizes that must stay whole, such as a head's width; 1 by default.
        """
        units = units or (1,) * len(shape)
        for size, axis, unit, mesh_axes in zip(shape, logical, units, self.mesh_axes(logical)):
            parts = math.prod(self.mesh.shape[mesh_axis] for mesh_axis in mesh_axes)
            if size % (parts * unit):
                over = " x ".join(mesh_axes)
                length = f"{size // unit} x {unit}" if unit > 1 else str(size)
                raise ValueError(
                    f"{name}: its {axis!r} axis of {length} cannot be split over the {parts} parts of "
                    f"mesh axis {over}; change that size, or mesh.{mesh_axes[-1]}."
                )
