"""The neurons in use as the kernels want them: their numbers in blocks, and their gates beside them.

Legend: J = rows of a block, N = neurons in use, then 0, in whole blocks.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from effarch.kernels import dispatch
from effarch.kernels.sparse_ffn import api, reference, xla

ROWS = xla.ROWS
"""J at most; what the kernels take divides it."""


def run(gathered: Callable, gate, x, up, down):
    """`gathered(index_N, count, gate_BN, x, up, down)` -> y [B,D] float32, or all neurons in order.

    As `xla` decides, by how many are in use. B is filled up to whole tiles of rows with zeros.
    """
    is_active_F = jnp.any(gate != 0, axis=0)
    count = jnp.sum(is_active_F, dtype=jnp.int32)

    def few(gate, x, up, down):
        index_N = xla.positions(is_active_F)
        is_real_N = jnp.arange(len(index_N)) < count
        gate_BN = jnp.where(is_real_N, gate[:, index_N].astype(jnp.float32), 0)
        behind = [(0, -gate.shape[0] % 16), (0, 0)]
        y = gathered(index_N, count, jnp.pad(gate_BN, behind), jnp.pad(x, behind), up, down)
        return y[: gate.shape[0]].astype(x.dtype)

    return jax.lax.cond(api.pays(count, up.shape[0]), few, reference.sparse_ffn, gate, x, up, down)


def check(x, up, down, multiple: int) -> None:
    """Raises `Unsupported` for widths and types that the kernels do not take."""
    widths = up.size // len(up), down.size // len(down)
    if any(width % multiple for width in widths):
        raise dispatch.Unsupported(
            f"rows of {widths[0]} and {widths[1]} are not multiples of {multiple}"
        )
    for array in (x, up, down):
        if array.dtype not in (jnp.float32, jnp.bfloat16):
            raise dispatch.Unsupported(f"an operand is {array.dtype}, not float32 or bfloat16")


def dot(a, b, *, transposed: bool = False):
    """a b, or a b^T, float32; float32 operands keep their digits."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dims = (((1,), (1 if transposed else 0,)), ((), ()))
    return jax.lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)
