"""Kernels on a matrix that a mesh cuts: XLA cannot split one, each device runs it on its piece."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.sharding import NamedSharding, PartitionSpec

from effarch.kernels import dispatch


class Piece(NamedTuple):
    """A device's own piece of a matrix, inside `jax.shard_map`."""

    start: jax.Array
    """The number of its first element in the whole matrix, row by row; int32."""
    columns: int
    """Of the whole matrix."""
    axes: tuple[str, ...]
    """The mesh axes over which pieces differ."""


def run(
    function: Callable,
    x: jax.Array,
    cut: NamedSharding,
    axis: int,
    unit: int,
    *others: Any,
    outputs: Any,
    checked: bool,
):
    """`function(piece of x, Piece, *others)` on every device; `outputs`: where its results lie.

    `checked` False: interpreted kernels, which do not say over which axes what they read varies.
    Raises `Unsupported` where the mesh would cut x inside `unit` elements along `axis`, and in pieces.
    """
    if jax.sharding.AxisType.Manual in jax.sharding.get_abstract_mesh().axis_types:
        raise dispatch.Unsupported("it is inside a jax.shard_map over some of the mesh")
    named = [() if entry is None else entry for entry in cut.spec]
    named = [(entry,) if isinstance(entry, str) else tuple(entry) for entry in named]
    parts = [math.prod(cut.mesh.shape[name] for name in names) for names in named]
    units = [unit if dim == axis % x.ndim else 1 for dim in range(x.ndim)]
    if len(parts) != x.ndim or any(n % (p * u) for n, p, u in zip(x.shape, parts, units)):
        raise dispatch.Unsupported(f"the mesh cuts {x.shape} inside blocks of {unit}")

    def on_piece(x, *others):
        rows, columns = (
            jax.lax.axis_index(names) * size if names else 0 for names, size in zip(named, x.shape)
        )
        piece = Piece(rows * whole + columns, whole, named[0] + named[1])
        return function(x, piece, *others)

    whole = x.shape[1]
    specs = (cut.spec, *[PartitionSpec()] * len(others))
    options = dict(in_specs=specs, out_specs=outputs, check_vma=checked)
    return jax.shard_map(on_piece, mesh=cut.mesh, **options)(x, *others)
