"""AdamW with both moments in FP8: "COAT", arXiv 2410.19313, dynamic range expansion.

The numbers and the update are those of `kernels.coat_adam`.
"""

import functools
from typing import Any

import optax

from effarch.kernels.coat import api, xla
from effarch.training.optimizers import stored_moments, updates


def coat(
    schedule: optax.ScalarOrSchedule,
    *,
    b1: float = 0.9,
    b2: float = 0.95,
    eps: float = 1e-8,
    weight_decay: float = 0.1,
    group_size: int = 128,
    expand: bool = True,
    groups: Any,
) -> optax.GradientTransformation:
    """AdamW with 2 + 16 / group_size bytes of state a parameter rather than 8. `expand` False: k = 1."""
    updates.check_range("coat.b1", b1, 0, 1)
    updates.check_range("coat.b2", b2, 0, 1)
    updates.check_range("coat.weight_decay", weight_decay, 0)
    updates.check_range("coat.group_size", group_size, 1)
    options = dict(b1=b1, b2=b2, eps=eps, group_size=group_size, expand=expand)

    def step(g, m, v, count):
        return api.coat_adam(g, api.Moment(*m), api.Moment(*v), count, **options)

    store = functools.partial(xla.store, group_size=group_size, expand=expand)
    return updates.finish(
        {"coat": stored_moments.stored(step, store, store)},
        lambda group: "coat",
        groups=groups,
        schedule=schedule,
        weight_decay=weight_decay,
    )
