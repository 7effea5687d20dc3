"""DCT-AdamW: AdamW in a low-rank subspace of each matrix, chosen anew each step without an SVD.

"SVD-Free Low-Rank Adaptive Gradient Optimization for LLMs", arXiv 2505.17967. For a matrix G [R, n],
R >= n, with the basis and the selection of `dct`:

    A = G + E,   g, idx from A,   E = A - g C[idx]                 (E only with `error_feedback`)
    m <- m P,   v <- |v P|                  P: the columns that stay selected keep their moments
    m <- b1 m + (1 - b1) g,   v <- b2 v + (1 - b2) g^2,   d = m^ / (sqrt(v^) + eps) C[idx]

Columns that are new start at zero. Tables and vectors have AdamW. Moments lie where their parameter
does, with the shorter side cut to `rank`. Where we differ: the error is kept in float32, not in 8 or 4
bits.
"""

import functools
import operator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from effarch import names
from effarch.training.optimizers import dct, updates


def dct_adamw(
    schedule: optax.ScalarOrSchedule,
    *,
    b1: float = 0.9,
    b2: float = 0.95,
    eps: float = 1e-8,
    weight_decay: float = 0.1,
    rank: int = 128,
    norm: int = 1,
    update_gap: int = 1,
    error_feedback: bool = False,
    groups: Any,
) -> optax.GradientTransformation:
    """AdamW with 8 rank / n bytes of state for each weight of a matrix [R, n], R >= n, rather than 8.

    norm: 1 or 2, by which columns are ranked. update_gap: steps between choices of the subspace.
    error_feedback: 4 bytes more, what a step leaves out is added to the next gradient.
    """
    updates.check_range("dct_adamw.b1", b1, 0, 1)
    updates.check_range("dct_adamw.b2", b2, 0, 1)
    updates.check_range("dct_adamw.weight_decay", weight_decay, 0)
    updates.check_range("dct_adamw.rank", rank, 1)
    updates.check_range("dct_adamw.update_gap", update_gap, 1)
    names.lookup({1: 1, 2: 2}, norm, "optimizer.dct_adamw.norm")
    low_rank = _scale_by_low_rank_adam(
        dct.Sides(groups), b1, b2, eps, rank, norm, update_gap, error_feedback
    )
    return updates.finish(
        {"low_rank": low_rank, "adam": optax.scale_by_adam(b1, b2, eps)},
        updates.matrices_to("low_rank"),
        groups=groups,
        schedule=schedule,
        weight_decay=weight_decay,
    )


class State(NamedTuple):
    """Trees in the shape of the parameters."""

    count: Array
    m: Any
    v: Any
    index: Any
    """[..., rank] int32."""
    error: Any
    """float32, or empty without error feedback."""


class _Matrix(NamedTuple):
    """What one matrix has; as a result, `m`, `v` and so on are the next ones."""

    direction: Array | None
    m: Array
    v: Array
    index: Array
    error: Array | None


def _scale_by_low_rank_adam(sides, b1, b2, eps, rank, norm, update_gap, error_feedback):
    def init(params):
        def one(key_path, param):
            long, short = sides.of(key_path, param.shape)
            size = min(rank, param.shape[short])
            shape = [size if dim == short else n for dim, n in enumerate(param.shape)]
            outer = [n for dim, n in enumerate(param.shape) if dim not in (long, short)]
            # Nothing is selected yet: no column stays.
            index = jnp.full((*outer, size), -1, jnp.int32)
            error = jnp.zeros_like(param) if error_feedback else None
            return _Matrix(None, jnp.zeros(shape), jnp.zeros(shape), index, error)

        found = jax.tree_util.tree_map_with_path(one, params)
        return State(jnp.zeros((), jnp.int32), *_unzip(found)[1:])

    def update(grads, state, params=None):
        count = optax.safe_increment(state.count)

        def one(key_path, grad, m, v, index, error):
            turn = functools.partial(sides.turn, key_path, shape=grad.shape)
            turn_back = functools.partial(sides.turn_back, key_path, shape=grad.shape)
            matrix = turn(grad if error is None else grad + error)
            turned, chosen = dct.select(matrix, index.shape[-1], norm)
            if update_gap > 1:
                chosen = jnp.where(state.count % update_gap == 0, chosen, index)
            g = dct.columns(turned, chosen)
            m = b1 * _follow(turn(m), index, chosen) + (1 - b1) * g
            v = b2 * _follow(turn(v), index, chosen) + (1 - b2) * g * g
            direction = (m / (1 - b1**count)) / (jnp.sqrt(v / (1 - b2**count)) + eps)
            n = matrix.shape[-1]
            left = None if error is None else turn_back(matrix - dct.back(g, chosen, n))
            return _Matrix(
                turn_back(dct.back(direction, chosen, n)), turn_back(m), turn_back(v), chosen, left
            )

        found = jax.tree_util.tree_map_with_path(
            one, grads, state.m, state.v, state.index, state.error
        )
        directions, *rest = _unzip(found)
        return directions, State(count, *rest)

    return optax.GradientTransformation(init, update)


def _follow(moment: Array, before: Array, now: Array) -> Array:
    """The moments [..., R, r] of the columns `now`, those that were not in `before` zero."""
    stays = before[..., :, None] == now[..., None, :]  # [..., r before, r now], at most one a row
    return moment @ stays.astype(moment.dtype)


def _unzip(tree):
    """A tree of _Matrix as a _Matrix of trees."""
    fields = [
        jax.tree.map(operator.attrgetter(field), tree, is_leaf=lambda x: isinstance(x, _Matrix))
        for field in _Matrix._fields
    ]
    return _Matrix(*fields)
