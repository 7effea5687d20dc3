"""The product of two arrays in blocks of small numbers, without their wide copies in memory.

    y = sum over blocks k of s_a[k] s_b[k] (q_a[k] q_b[k]),   times both tensor scales

Blocks lie along the contraction; those of b may be square tiles (DeepSeek-V3's weights, 2412.19437). An
element times an E8M0 or E4M3 scale has at most eight bits, so bfloat16 holds it and the products are
exact; sums with float32 scales are scaled block by block. All sums are float32.
"""

import jax
import jax.numpy as jnp

from effarch.kernels import dispatch
from effarch.kernels.quantize.api import QuantizedArray

BACKENDS = ("reference", "xla", "pallas_tpu", "pallas_gpu")
MOST_ROWS = 512
"""Of a, for the kernels: with more, b's bytes are read little and its blocks taken apart often."""


def block_matmul(
    a: QuantizedArray, b: QuantizedArray, *, dtype=jnp.float32, backend: str | None = None
) -> jax.Array:
    """y [M,N] in `dtype` from a [M,K] with blocks along K and b [K,N] with blocks along K or tiles.

    Both have blocks of one size. Values and forward derivatives only: what trains quantizes its own
    gradients. Raises ValueError for arrays that do not fit.
    """
    blocks_a, blocks_b = dict(a.axes), dict(b.axes)
    size = blocks_a.get(1)
    fits = _shape(b)[0] == _shape(a)[1] and set(blocks_a) == {1} and blocks_b.get(0) == size
    if not fits or blocks_b.get(1, size) != size:
        raise ValueError(
            f"block_matmul: a {_shape(a)} with blocks {a.axes} and b {_shape(b)} with blocks {b.axes} "
            "do not fit; give a [M,K] with blocks along 1, and b [K,N] with blocks of the same size "
            "along 0 or along both."
        )
    y = dispatch.call("block_matmul", "block_matmul", BACKENDS, backend, a, b, size)
    return (y * (a.tensor_scale * b.tensor_scale)).astype(dtype)


def is_exact_in_bfloat16(a: QuantizedArray) -> bool:
    """Whether bfloat16 holds every element times its block's scale (not the tensor's)."""
    return a.format.scale != "float32"


def _shape(a: QuantizedArray) -> tuple[int, int]:
    if a.codes.ndim != 2:
        raise ValueError(
            f"block_matmul: an operand has shape {a.codes.shape}; give matrices, a [M,K] and b [K,N]."
        )
    return a.codes.shape
