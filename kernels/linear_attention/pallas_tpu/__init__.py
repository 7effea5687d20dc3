"""Linear attention on TPUs: `forward` and `backward` are one kernel each, for both kinds of decay."""

from effarch.kernels.linear_attention.pallas_tpu.decode import linear_attention_step
from effarch.kernels.linear_attention.pallas_tpu.rule import linear_attention

__all__ = ["linear_attention", "linear_attention_step"]
