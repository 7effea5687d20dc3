"""AdamW: "Decoupled Weight Decay Regularization", arXiv 1711.05101.

    m <- b1 m + (1 - b1) g,   v <- b2 v + (1 - b2) g^2,   d = m^ / (sqrt(v^) + eps)

with m^ and v^ corrected for their start at zero. b2 = 0.95, as is usual for language models
(optax: 0.999).
"""

from typing import Any

import optax

from effarch.training.optimizers import updates


def adamw(
    schedule: optax.ScalarOrSchedule,
    *,
    b1: float = 0.9,
    b2: float = 0.95,
    eps: float = 1e-8,
    weight_decay: float = 0.1,
    groups: Any,
) -> optax.GradientTransformation:
    """optax's Adam with the groups' multipliers and decay. State: two float32 a parameter."""
    updates.check_range("adamw.b1", b1, 0, 1)
    updates.check_range("adamw.b2", b2, 0, 1)
    updates.check_range("adamw.weight_decay", weight_decay, 0)
    return updates.finish(
        {"adam": optax.scale_by_adam(b1, b2, eps)},
        lambda group: "adam",
        groups=groups,
        schedule=schedule,
        weight_decay=weight_decay,
    )
