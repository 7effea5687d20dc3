"""Pure functions on arrays, each with several backends that agree.

Every operation is a folder: `api.py` (the public function), `reference.py` (the definition, slow and
plain), `xla.py` (the fast jnp form, any device) and optional Pallas backends.
"""

from effarch.kernels.attention.api import attention
from effarch.kernels.cross_entropy.api import linear_cross_entropy
from effarch.kernels.delta_rule.api import gated_delta_rule, gated_delta_rule_step
from effarch.kernels.short_conv.api import short_conv

__all__ = [
    "attention",
    "gated_delta_rule",
    "gated_delta_rule_step",
    "linear_cross_entropy",
    "short_conv",
]
