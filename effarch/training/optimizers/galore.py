"""GaLore: Adam in a subspace found by an SVD every so many steps, the baseline for `dct_adamw`.

Zhao et al., arXiv 2403.03507, as `optax.contrib.scale_by_galore` has it: the subspace is that of the
longer side (the paper projects the shorter one), the moments [rank, shorter side]. It knows single
matrices, so stacked ones are handed to it one by one, and its state is not sharded: a baseline for small
models. Tables and vectors have AdamW.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from effarch.models import parameters
from effarch.training.optimizers import updates


def galore(
    schedule: optax.ScalarOrSchedule,
    *,
    b1: float = 0.9,
    b2: float = 0.95,
    eps: float = 1e-8,
    weight_decay: float = 0.1,
    rank: int = 128,
    update_gap: int = 200,
    scale: float = 0.25,
    groups: Any,
) -> optax.GradientTransformation:
    """AdamW with 4 rank (1/n + 2/R) bytes of state for each weight of a matrix [R, n], R >= n.

    update_gap: steps between SVDs. scale: of the updates, as the paper's.
    """
    updates.check_range("galore.b1", b1, 0, 1)
    updates.check_range("galore.b2", b2, 0, 1)
    updates.check_range("galore.weight_decay", weight_decay, 0)
    updates.check_range("galore.rank", rank, 1)
    updates.check_range("galore.update_gap", update_gap, 1)
    if not hasattr(optax.contrib, "scale_by_galore"):
        raise ValueError(
            "optimizer.kind='galore' needs optax 0.2.8 or later: pip install -U optax."
        )
    inner = optax.contrib.scale_by_galore(
        rank, update_gap, scale, base_optimizer=optax.scale_by_adam(b1, b2, eps)
    )
    return updates.finish(
        {"galore": _one_by_one(inner, groups), "adam": optax.scale_by_adam(b1, b2, eps)},
        updates.matrices_to("galore"),
        groups=groups,
        schedule=schedule,
        weight_decay=weight_decay,
    )


def _one_by_one(inner, groups) -> optax.GradientTransformation:
    """`inner` on a list of single matrices for each parameter."""
    dims_of = {group.path: group.matrix_dims for group in jax.tree.leaves(groups)}

    def split(key_path, x):
        matrices = jnp.moveaxis(x, dims_of[parameters.path_of(key_path)], (-2, -1))
        return list(matrices.reshape(-1, *matrices.shape[-2:]))

    def join(key_path, x, matrices):
        dims = dims_of[parameters.path_of(key_path)]
        shape = jnp.moveaxis(x, dims, (-2, -1)).shape
        return jnp.moveaxis(jnp.stack(matrices).reshape(shape), (-2, -1), dims)

    def update(grads, state, params=None):
        matrices = jax.tree_util.tree_map_with_path(split, grads)
        directions, state = inner.update(matrices, state)
        return jax.tree_util.tree_map_with_path(join, grads, directions), state

    return optax.GradientTransformation(
        lambda params: inner.init(jax.tree_util.tree_map_with_path(split, params)), update
    )
