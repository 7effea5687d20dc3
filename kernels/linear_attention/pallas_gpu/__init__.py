"""Linear attention as Pallas kernels for GPUs (Triton), from the parts of the delta rule's."""

from effarch.kernels.linear_attention.pallas_gpu.decode import linear_attention_step
from effarch.kernels.linear_attention.pallas_gpu.rule import linear_attention

__all__ = ["linear_attention", "linear_attention_step"]
