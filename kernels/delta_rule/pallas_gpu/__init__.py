"""The delta rule as Pallas kernels for GPUs (Triton)."""

from effarch.kernels.delta_rule.pallas_gpu.decode import gated_delta_rule_step
from effarch.kernels.delta_rule.pallas_gpu.rule import gated_delta_rule

__all__ = ["gated_delta_rule", "gated_delta_rule_step"]
