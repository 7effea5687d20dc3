"""Grouped matrix product: consecutive groups of rows, each times a matrix of its own.

    y[m] = x[m] @ w[e]   for the rows m of group e;   0 for rows past the last group

The product of dropless mixtures of experts (MegaBlocks, arXiv 2211.15841): rows are tokens sorted by
expert, groups may be empty.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from effarch.kernels import dispatch, platform

BACKENDS = ("pallas_tpu", "pallas_gpu", "xla", "reference")
BLOCK = 128
"""Rows of a block of the kernels for TPUs and GPUs."""


def grouped_matmul(
    x: Float[Array, "M D"],
    w: Float[Array, "E D F"],
    group_sizes: Int[Array, " E"],
    *,
    aligned: int = 1,
    backend: str | None = None,
) -> Float[Array, "M F"]:
    """x times the matrix of each row's group; group e has the next `group_sizes[e]` rows.

    Operands in x's dtype (w is cast to it), float32 sums, result in x's dtype. Gradients of x and w are
    exact: zero for empty groups and for rows past the last group. Reverse mode only, but for the
    reference. The sizes must not add up to more than M: they are traced, so this is not checked.
    `aligned`: a number that every group size, and M, is a multiple of, if the caller laid the rows
    out so (see `alignment`); blocks of so many rows then need not be moved together first.
    Raises ValueError for arguments that do not fit.
    """
    x, w, group_sizes = jnp.asarray(x), jnp.asarray(w), jnp.asarray(group_sizes)
    _check(x, w, group_sizes, aligned)
    return dispatch.call(
        "grouped_matmul",
        "grouped_matmul",
        BACKENDS,
        backend,
        x,
        w.astype(x.dtype),
        group_sizes.astype(jnp.int32),
        aligned=aligned,
    )


def alignment(num_rows: int, num_groups: int) -> int:
    """The multiple of rows that groups should be padded to with zeros for speed; 1 means as they are.

    A block of rows of one group is one product: on CPUs as many rows as lose little in padding, on
    accelerators those of a tile, if groups have as many on average.
    """
    if platform.current() != "cpu":
        return BLOCK if num_rows >= BLOCK * num_groups else 1
    block = 8
    while block < 128 and 4 * block * num_groups <= num_rows:
        block *= 2
    return block


def _check(x, w, group_sizes, aligned) -> None:
    if x.ndim != 2 or w.ndim != 3 or x.shape[1] != w.shape[1]:
        raise ValueError(
            f"grouped_matmul: x {x.shape} and w {w.shape} do not fit; give x [M,D] and w [E,D,F]."
        )
    integer = jnp.issubdtype(group_sizes.dtype, jnp.integer)
    if group_sizes.shape != w.shape[:1] or not integer:
        raise ValueError(
            f"grouped_matmul: group_sizes is {group_sizes.dtype}{list(group_sizes.shape)}; give "
            f"integers of shape [{w.shape[0]}], the number of rows of each matrix of w."
        )
    if aligned < 1 or x.shape[0] % aligned:
        raise ValueError(
            f"grouped_matmul: aligned={aligned} does not divide the {x.shape[0]} rows of x; pad x to a "
            "multiple of it, or leave aligned=1."
        )
