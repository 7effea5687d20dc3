"""Which parameter an array of the optimizer state belongs to, by the end of its path.

optax keeps moments in copies of the parameter tree, so a leaf of the state is called
`2/0/inner_states/adam/inner_state/mu/layers/0/ffn/up/kernel`: its path ends with the parameter's.
That holds for masked and chained optimizers, where `optax.tree_map_params` of two trees fails.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax

from effarch.models import parameters


def by_path(infos: Any) -> dict[str, parameters.ParamInfo]:
    """The infos of a nested dict, keyed by parameter path."""
    return {info.path: info for info in jax.tree.leaves(infos)}


def logical_axes(
    opt_state_leaf_path: str,
    leaf_shape: Sequence[int],
    infos_by_path: Mapping[str, parameters.ParamInfo],
) -> tuple[str | None, ...] | None:
    """The logical axes of a leaf: its parameter's, if it has one.

    What groups along the last dimension share, [..., groups, n], has those of the other dimensions, what
    has one dimension cut short (low rank) those of the rest. None for other shapes and for counters.
    """
    info = _owner(opt_state_leaf_path, infos_by_path)
    if info is None:
        return None
    if tuple(info.shape) == tuple(leaf_shape):
        return info.logical
    if len(leaf_shape) == len(info.shape) + 1 and info.shape[:-1] == tuple(leaf_shape[:-2]):
        return (*info.logical[:-1], None, None)
    if len(leaf_shape) == len(info.shape):
        kept = [size == whole for size, whole in zip(leaf_shape, info.shape)]
        if kept.count(False) == 1:
            return tuple(axis if same else None for axis, same in zip(info.logical, kept))
    return None


def _owner(path: str, infos_by_path) -> parameters.ParamInfo | None:
    """The parameter whose path is the longest suffix of `path`."""
    levels = path.split("/")
    suffixes = ("/".join(levels[start:]) for start in range(len(levels)))
    return next((infos_by_path[name] for name in suffixes if name in infos_by_path), None)
