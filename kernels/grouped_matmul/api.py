"""Grouped matrix product: consecutive groups of rows, each times a matrix of its own.

    y[m] = x[m] @ w[e]   for the rows m of group e;   0 for rows past the last group

The product of dropless mixtures of experts (MegaBlocks, arXiv 2211.15841): rows are tokens sorted by
expert, groups may be empty.
"""

import functools
from collections.abc import Callable, Sequence

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
    out so (see `alignment`); the kernels for TPUs and GPUs need it.
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


def grouped_feed_forward(
    x: Float[Array, "M D"],
    w_in: Sequence[Float[Array, "E D F"]],
    w_out: Float[Array, "E F D"],
    group_sizes: Int[Array, " E"],
    activation: Callable[[Array], Array],
    *,
    aligned: int = 1,
    backend: str | None = None,
) -> Float[Array, "M D"]:
    """y = act(x W_in) W_out by each row's group, or (act(x W_gate) * (x W_up)) W_out.

    `w_in` holds W_in, or W_gate and W_up; `activation` acts on elements and is one object from call to
    call. On CPUs one loop over blocks (`feed_forward.py`), elsewhere `grouped_matmul` for each product;
    the other arguments are that function's. Gradients are exact, as there; with their own type, those
    of float32 matrices beside bfloat16 rows are float32 sums. Raises ValueError for arguments that do
    not fit.
    """
    x, w_out, group_sizes = jnp.asarray(x), jnp.asarray(w_out), jnp.asarray(group_sizes)
    w_in = tuple(jnp.asarray(w) for w in w_in)
    _check_weights(x, w_in, w_out)
    if platform.current() == "cpu" and backend in (None, "xla"):
        _check(x, w_in[0], group_sizes, aligned)
        args = (x, w_in, w_out, group_sizes.astype(jnp.int32), activation)
        options = dict(aligned=aligned)
        return dispatch.call(
            "grouped_matmul", "grouped_feed_forward", BACKENDS, "xla", *args, **options
        )
    product = functools.partial(
        grouped_matmul, group_sizes=group_sizes, aligned=aligned, backend=backend
    )
    h = activation(product(x, w_in[0]))
    h = h * product(x, w_in[1]) if len(w_in) == 2 else h
    return product(h, w_out)


def alignment(num_rows: int, num_groups: int) -> int:
    """The multiple of rows that groups should be padded to with zeros for speed; 1 means as they are.

    On accelerators the rows of a tile, if groups have as many on average: a tile of one group is one
    product. On CPUs blocks may begin at any row.
    """
    if platform.current() == "cpu" or num_rows < BLOCK * num_groups:
        return 1
    return BLOCK


def _check_weights(x, w_in, w_out) -> None:
    shapes = [w.shape for w in w_in]
    fit = len(shapes) in (1, 2) and w_out.ndim == 3 and len(set(shapes)) == 1
    if not fit or shapes[0] != (w_out.shape[0], x.shape[-1], w_out.shape[1]):
        raise ValueError(
            f"grouped_feed_forward: w_in {shapes} and w_out {w_out.shape} do not fit x {x.shape}; give "
            "one or two matrices [E,D,F], gate first, and w_out [E,F,D]."
        )


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
