"""Pure functions on arrays, each with several backends that agree.

Every operation is a folder: `api.py` (the public function), `reference.py` (the definition, slow and
plain), `xla.py` (the fast jnp form, any device) and optional Pallas backends.
"""

from effarch.kernels.attention.api import attention
from effarch.kernels.block_matmul.api import block_matmul
from effarch.kernels.coat.api import coat_adam
from effarch.kernels.cross_entropy.api import linear_cross_entropy
from effarch.kernels.delta_rule.api import gated_delta_rule, gated_delta_rule_step
from effarch.kernels.grouped_matmul.api import grouped_matmul
from effarch.kernels.hadamard.api import hadamard
from effarch.kernels.linear_attention.api import linear_attention, linear_attention_step
from effarch.kernels.quantize.api import QuantizedArray, quantize
from effarch.kernels.short_conv.api import short_conv
from effarch.kernels.sparse_ffn.api import sparse_ffn
from effarch.kernels.topk.api import (
    exact_top_k,
    gaussian_top_k,
    statistical_threshold,
    statistical_top_k,
)
from effarch.kernels.vector_recurrence.api import vector_recurrence

__all__ = [
    "QuantizedArray",
    "attention",
    "block_matmul",
    "coat_adam",
    "exact_top_k",
    "gated_delta_rule",
    "gated_delta_rule_step",
    "gaussian_top_k",
    "grouped_matmul",
    "hadamard",
    "linear_attention",
    "linear_attention_step",
    "linear_cross_entropy",
    "quantize",
    "short_conv",
    "sparse_ffn",
    "statistical_threshold",
    "statistical_top_k",
    "vector_recurrence",
]
