"""Trion: Muon in a low-rank subspace, chosen each step without an SVD ("Dion with DCT").

"SVD-Free Low-Rank Adaptive Gradient Optimization for LLMs", arXiv 2505.17967. For a matrix G [R, n],
R >= n, with the basis and the selection of `dct`:

    M <- M + G,   g, idx from M,   M <- M - (1 - momentum) g C[idx]
    d = update_rms sqrt(R) NS(g) C[idx]

What is not selected stays in M whole: the momentum is its own error feedback. NS is Muon's iteration, on
[R, rank] rather than [R, n]. At full rank this is Muon without Nesterov. Tables and vectors have Adam.
"""

from typing import Any

import jax
import optax

from effarch import names
from effarch.training.optimizers import dct, muon, updates


def trion(
    schedule: optax.ScalarOrSchedule,
    *,
    momentum: float = 0.95,
    rank: int = 128,
    norm: int = 1,
    ns_steps: int = 5,
    update_rms: float = 0.2,
    weight_decay: float = 0.1,
    adam_b1: float = 0.9,
    adam_b2: float = 0.95,
    adam_eps: float = 1e-8,
    groups: Any,
) -> optax.GradientTransformation:
    """Muon's state, one float32 a matrix parameter; Newton-Schulz costs rank / n of its FLOPs or less.

    norm: 1 or 2, by which columns are ranked. update_rms: as Muon's; at rank r of n the update's rms is
    sqrt(r / n) of it.
    """
    updates.check_range("trion.momentum", momentum, 0, 1)
    updates.check_range("trion.rank", rank, 1)
    updates.check_range("trion.ns_steps", ns_steps, 1)
    updates.check_range("trion.adam_b1", adam_b1, 0, 1)
    updates.check_range("trion.adam_b2", adam_b2, 0, 1)
    updates.check_range("trion.weight_decay", weight_decay, 0)
    names.lookup({1: 1, 2: 2}, norm, "optimizer.trion.norm")
    matrices = _orthogonal_low_rank(dct.Sides(groups), momentum, rank, norm, ns_steps, update_rms)
    return updates.finish(
        {"trion": matrices, "adam": optax.scale_by_adam(adam_b1, adam_b2, adam_eps)},
        updates.matrices_to("trion"),
        groups=groups,
        schedule=schedule,
        weight_decay=weight_decay,
    )


def _orthogonal_low_rank(sides, momentum, rank, norm, ns_steps, update_rms):
    def one(key_path, grad, trace):
        total = sides.turn(key_path, trace + grad, shape=grad.shape)
        rows, n = total.shape[-2:]
        turned, index = dct.select(total, min(rank, n), norm)
        low = dct.columns(turned, index)
        left = total - (1 - momentum) * dct.back(low, index, n)
        orthogonal = muon.orthogonalize(low, ns_steps)
        direction = update_rms * rows**0.5 * dct.back(orthogonal, index, n)
        return tuple(sides.turn_back(key_path, x, shape=grad.shape) for x in (direction, left))

    def update(grads, state, params=None):
        pairs = jax.tree_util.tree_map_with_path(one, grads, state.trace)
        outer, inner = jax.tree.structure(grads), jax.tree.structure((0, 0))
        directions, trace = jax.tree.transpose(outer, inner, pairs)
        return directions, optax.TraceState(trace=trace)

    return optax.GradientTransformation(optax.trace(momentum).init, update)
