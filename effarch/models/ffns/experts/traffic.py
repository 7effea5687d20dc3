"""Bytes that expert parallelism moves: what arrives at one device, from others, in a forward pass.

For N tokens of a device, K choices, S devices and rows of `i` numbers out and `o` back:

    all_to_all  (S - 1) C (i + o),  C = N min(K, E / S) rows for each device, or a capacity
    ragged      N K (S - 1) / S (i + o) where the load is even
    ring        (S - 1) N (i + o), and the choices

Plus 4 bytes a row for the expert's number (of its weight too, for the ring). A backward pass moves the
rows once more, and gathers what the ring gathered. `row_widths` of the experts gives i and o: D and D
for plain experts, L and L for experts in a latent, 2 L and D for MoLE (L tied; L back in version 2).
"""

import math

_NUMBER = 4


def bytes_arriving(
    row_widths: tuple[int, int],
    *,
    way: str,
    num_tokens: int,
    top_k: int,
    num_experts: int,
    num_shards: int,
    capacity_factor: float | None = None,
    itemsize: int = 2,
) -> float:
    """`num_tokens` are those of one device, `itemsize` the bytes of a number in a row."""
    others, local = num_shards - 1, num_experts // num_shards
    row = sum(row_widths) * itemsize
    if way == "ring":
        return others * num_tokens * (row + 2 * _NUMBER * top_k)
    if way == "ragged":
        rows = num_tokens * top_k / num_shards
        return others * (rows * (row + _NUMBER) + num_shards * _NUMBER)
    rows = num_tokens * min(top_k, local)
    if capacity_factor is not None:
        each = math.ceil(capacity_factor * num_tokens * top_k / num_experts)
        rows = min(rows, local * min(each, num_tokens))
    return others * rows * (row + _NUMBER)
