"""Giving arrays the same varying mesh axes, for code that may run inside `jax.shard_map`.

A scan whose carry starts from plain zeros, or a custom gradient whose inputs are partly replicated,
is refused there because the types of its arrays differ. `align` makes the types equal; outside of
`shard_map` it changes nothing. Its transpose is a sum over the axes that an array gained, so the
gradient of a replicated input is right.
"""

from collections.abc import Sequence

import jax


def align(arrays: Sequence[jax.Array | None]) -> list[jax.Array | None]:
    """The same arrays (None stays None), each varying over all axes that any of them varies over."""
    union = frozenset().union(*(axes(array) for array in arrays if array is not None))
    return [array if array is None else _vary(array, union - axes(array)) for array in arrays]


def axes(array: jax.Array) -> frozenset[str]:
    """The mesh axes over which an array varies; empty outside of a checked `jax.shard_map`."""
    kind = jax.typeof(array)
    manual = getattr(kind, "manual_axis_type", None)  # newer JAX; `vma` before
    return getattr(kind, "vma", frozenset()) if manual is None else manual.varying


def shape_like(shape: Sequence[int], dtype, like: jax.Array) -> jax.ShapeDtypeStruct:
    """An output of `pallas_call` that varies over the mesh axes that `like` varies over."""
    kind = jax.typeof(like)
    manual = getattr(kind, "manual_axis_type", None)  # newer JAX; `vma` before
    if manual is None:
        return jax.ShapeDtypeStruct(shape, dtype, vma=getattr(kind, "vma", None))
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=manual)


def _vary(array: jax.Array, axes: frozenset[str]) -> jax.Array:
    return jax.lax.pcast(array, tuple(sorted(axes)), to="varying") if axes else array
