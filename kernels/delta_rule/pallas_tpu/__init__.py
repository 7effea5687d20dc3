"""The gated delta rule on TPUs: `forward` and `backward` are one kernel each."""

from effarch.kernels.delta_rule.pallas_tpu.decode import gated_delta_rule_step
from effarch.kernels.delta_rule.pallas_tpu.rule import gated_delta_rule

__all__ = ["gated_delta_rule", "gated_delta_rule_step"]
