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


def match_parameter(
    opt_state_leaf_path: str,
    leaf_shape: Sequence[int],
    infos_by_path: Mapping[str, parameters.ParamInfo],
) -> parameters.ParamInfo | None:
    """The parameter whose path is the longest suffix of the leaf's, if the shapes are equal.

    None for counters, and for state in another shape than its parameter's.
    """
    levels = opt_state_leaf_path.split("/")
    for start in range(len(levels)):
        info = infos_by_path.get("/".join(levels[start:]))
        if info is not None:
            return info if tuple(info.shape) == tuple(leaf_shape) else None
    return None
