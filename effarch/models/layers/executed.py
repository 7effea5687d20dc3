"""FLOPs of matrix products that kernels do for a token, forward and backward.

More than the model needs: attention computes whole blocks and, backward, its scores again; recurrences
run in chunks of C tokens, whose pairs all meet, and pass their states forward again in the backward
pass. The plain JAX forms are counted, at the block and chunk sizes that they have on the current
platform; Pallas kernels, whose blocks differ, are not counted apart. A multiply-add is 2 FLOPs; decays,
softmax and other work of vectors is left out. Block and chunk sizes are asked of the kernels.

Legend: K and V widths of keys and values, C tokens of a chunk.
"""

import math
from typing import NamedTuple

from effarch.kernels.attention import masks
from effarch.kernels.attention import xla as attention_xla
from effarch.kernels.chunked import rows
from effarch.kernels.delta_rule import triangular


class Flops(NamedTuple):
    """Per token."""

    forward: float
    backward: float


def attention(seq_len: int, num_heads: int, k_dim: int, v_dim: int, window: int | None) -> Flops:
    """2 products forward; 5 backward, the scores among them."""
    options = masks.Options(True, window, None, 1.0, attention_xla.block_size(seq_len))
    pairs = 0
    for start in range(0, seq_len, options.block):
        stop = min(start + options.block, seq_len)
        low, high = masks.key_range(options, start, stop, seq_len)
        pairs += (stop - start) * (high - low)
    each = 2.0 * num_heads * pairs / seq_len
    return Flops(each * (k_dim + v_dim), each * (3 * k_dim + 2 * v_dim))


def delta_rule(
    seq_len: int,
    num_heads: int,
    k_dim: int,
    v_dim: int,
    *,
    num_k_heads: int,
    chunk_size: int | None,
    per_channel: bool = False,
) -> Flops:
    """A head forward: 6 K V + C (6 K + 4 V) + 2/3 (C^2 - 16^2), the last for the inverse.

    Heads that share keys share 4 C K of it. With a decay per channel 6 C K log2(C) in their place.
    """
    chunk, fill = _chunk(seq_len, chunk_size, per_channel)
    ck, cv, kv = chunk * k_dim, chunk * v_dim, k_dim * v_dim
    inverse = 2 / 3 * (chunk**2 - triangular.BLOCK**2)
    forward = num_heads * (6 * kv + 2 * ck + 4 * cv + inverse)
    backward = num_heads * (16 * kv + 2 * ck + 10 * cv)
    if per_channel:
        levels = math.log2(chunk)
        forward += num_heads * ck * (6 * levels + _CUMULATIVE)
        backward += num_heads * ck * (10 * levels + 2 * _CUMULATIVE)
    else:
        forward += num_k_heads * 4 * ck
        backward += num_k_heads * 12 * ck
    return Flops(fill * forward, fill * backward)


def linear_attention(
    seq_len: int,
    num_heads: int,
    k_dim: int,
    v_dim: int,
    *,
    num_k_heads: int,
    chunk_size: int | None,
    per_channel: bool = False,
) -> Flops:
    """A head forward: 4 K V + 2 C (K + V). Heads that share keys share 2 C K of it.

    With a decay per channel 4 C K log2(C) in its place.
    """
    chunk, fill = _chunk(seq_len, chunk_size, per_channel)
    ck, cv, kv = chunk * k_dim, chunk * v_dim, k_dim * v_dim
    forward = num_heads * (4 * kv + 2 * cv)
    backward = num_heads * (10 * kv + 4 * cv)
    if per_channel:
        levels = math.log2(chunk)
        forward += num_heads * ck * (4 * levels + _CUMULATIVE)
        backward += num_heads * ck * (6 * levels + 2 * _CUMULATIVE)
    else:
        forward += num_k_heads * 2 * ck
        backward += num_k_heads * 6 * ck
    return Flops(fill * forward, fill * backward)


_CUMULATIVE = 4
"""Times C K: the two cumulative sums of decays, which are products with triangular matrices."""


def _chunk(seq_len: int, chunk_size: int | None, per_channel: bool) -> tuple[int, float]:
    """C, and how many tokens are computed for one: the last chunk is filled up."""
    chunk = rows.chunk_length(seq_len, chunk_size, per_channel)
    return chunk, math.ceil(seq_len / chunk) * chunk / seq_len
