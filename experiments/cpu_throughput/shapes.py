"""The models that both sides build: one Llama shape and its gated-DeltaNet hybrid."""

import dataclasses

WIDTH, HIDDEN, DEPTH, HEADS, VOCAB = 256, 768, 8, 4, 512
HEAD_DIM = WIDTH // HEADS
TOKENS = 4096
"""Tokens of a step; a row has `Case.seq_len` of them."""


@dataclasses.dataclass(frozen=True)
class Case:
    """One row of the table."""

    model: str  # llama or hybrid
    dtype: str  # float32 or bfloat16
    seq_len: int

    @property
    def rows(self) -> int:
        return TOKENS // self.seq_len

    def __str__(self) -> str:
        return f"{self.model}:{self.dtype}:{self.seq_len}"


def parse(text: str) -> Case:
    """`llama:float32:256`. Raises ValueError for anything else."""
    parts = text.split(":")
    if len(parts) != 3 or parts[0] not in ("llama", "hybrid") or not parts[2].isdigit():
        raise ValueError(
            f"case {text!r} is not known; give MODEL:DTYPE:T such as llama:float32:256."
        )
    return Case(parts[0], parts[1], int(parts[2]))
