"""Parameters that start from how deep their layer lies: those with the metadata `start_at_depth`."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from effarch.models import parameters


def apply(model: nnx.Module, depth: int) -> None:
    """Fills each such parameter of layer l of a fresh model with start_at_depth(l / depth)."""
    state = nnx.state(model, nnx.Param)
    is_variable = dict(is_leaf=lambda node: isinstance(node, nnx.Variable))
    found = False
    for key_path, variable in jax.tree_util.tree_leaves_with_path(state, **is_variable):
        start = variable.get_metadata("start_at_depth", None)
        if start is not None:
            paths = parameters.public_paths(parameters.path_of(key_path))
            starts = np.array([start(int(path.split("/")[1]) / depth) for path in paths])
            value = variable.get_value()
            starts = starts.reshape(-1, *[1] * (value.ndim - 1)).astype(value.dtype)
            variable.set_value(jnp.zeros_like(value) + starts)
            found = True
    if found:
        nnx.update(model, state)
