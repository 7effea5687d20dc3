"""From directions to updates: what every optimizer here shares.

An optimizer computes a direction d from the gradients: Adam's m / (sqrt(v) + eps), Muon's
orthogonal matrix. The rest is the same for all, with decoupled weight decay (arXiv 1711.05101):

    p <- p - lr(step) * multiplier * (d + weight_decay * decay * p)

`multiplier`, `decay` and `frozen` come from the parameter's Group and may differ along a stacked
axis.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from effarch.training.optimizers import groups as groups_lib

_FROZEN = "frozen"


def finish(
    directions: dict[str, optax.GradientTransformation],
    label: Callable[[groups_lib.Group], str],
    *,
    groups: Any,
    schedule: optax.ScalarOrSchedule,
    weight_decay: float,
) -> optax.GradientTransformation:
    """The optimizer that moves each parameter along `directions[label(group)]`.

    Works in float32 whatever the parameters are (moments included). Arrays frozen as a whole
    get no moments. A frozen parameter's update is -0.0: added, it changes no bit, not even the
    sign of a zero (subnormal numbers excepted, which XLA may flush).
    """
    labels = jax.tree.map(lambda group: _FROZEN if group.is_frozen else label(group), groups)
    return _in_float32(
        optax.chain(
            optax.partition({**directions, _FROZEN: optax.set_to_zero()}, labels),
            _decay_and_scale(groups, weight_decay),
            optax.scale_by_learning_rate(schedule),
            _hold_frozen(groups),
        )
    )


def matrices_to(name: str) -> Callable[[groups_lib.Group], str]:
    """The label, for `finish`: `name` for matrices that no rule gave to adamw, `adam` for the rest."""
    return lambda group: name if group.kind == "matrix" and group.optimizer is None else "adam"


def check_range(name: str, value: float, low: float, high: float = float("inf")) -> None:
    """Raises ValueError unless low <= value < high; `name` is the field below `optimizer`."""
    if value is None or not low <= value < high:
        below = f" and below {high:g}" if high < float("inf") else ""
        raise ValueError(f"optimizer.{name} is {value}; it must be at least {low:g}{below}.")


def drop_frozen_gradients(groups: Any) -> optax.GradientTransformation:
    """Zeroes the gradients of frozen parameters, so that clipping does not count them."""

    def update(grads, params=None):
        return jax.tree.map(lambda group, grad: _where(group, 0.0, grad), groups, grads)

    return optax.stateless(update)


def _in_float32(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    def cast(tree):
        return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), tree)

    def update(grads, state, params=None):
        return inner.update(cast(grads), state, cast(params))

    return optax.GradientTransformation(lambda params: inner.init(cast(params)), update)


def _decay_and_scale(groups: Any, weight_decay: float) -> optax.GradientTransformation:
    """multiplier * (d + weight_decay * decay * p); leaves out factors that are 0 or 1."""

    def one(group, direction, param):
        decay = np.asarray(weight_decay * group.decay, np.float32)
        step = direction + decay * param if decay.any() else direction
        lr = np.asarray(group.lr, np.float32)
        return step if (lr == 1).all() else lr * step

    def update(directions, params):
        return jax.tree.map(one, groups, directions, params)

    return optax.stateless(update)


def _hold_frozen(groups: Any) -> optax.GradientTransformation:
    def update(updates, params=None):
        return jax.tree.map(lambda group, step: _where(group, -0.0, step), groups, updates)

    return optax.stateless(update)


def _where(group: groups_lib.Group, value: float, array: jax.Array) -> jax.Array:
    """`value` where the group is frozen, else `array`."""
    if isinstance(group.frozen, bool):
        return jnp.full_like(array, value) if group.frozen else array
    return jnp.where(group.frozen, jnp.asarray(value, array.dtype), array)
