"""Grouped matrix product on GPUs, in Triton: rows lie in blocks of one group each, as on TPUs.

    y_j = x_j W[group of j]        dx_j = g_j W[group of j]^T        dW[e] = sum over j of e of x_j^T g_j

The idea of MegaBlocks' block-sparse products, arXiv 2211.15841. A program makes a tile of y for one
block of rows, or a tile of dW of one group over all of its blocks; blocks past the last group are zeros.

Legend: J = blocks, R = rows of a block.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from effarch.kernels import dispatch, platform, varying
from effarch.kernels.grouped_matmul import rows
from effarch.kernels.grouped_matmul.api import BLOCK

_WIDTHS = (128, 64)
"""Sides of a tile of the result, widest first."""
_DEPTHS = {2: (64,), 4: (32,)}
"""Lengths of a step of the contraction, by the bytes of an operand."""


def grouped_matmul(x, w, group_sizes, *, aligned, interpret=False):
    """See `api.grouped_matmul`. `interpret` runs the kernels without a GPU: for tests."""
    if not interpret and platform.current() != "gpu":
        raise dispatch.Unsupported(f"it runs on GPUs, and this program is for {platform.current()}")
    if aligned % BLOCK:
        raise dispatch.Unsupported(
            f"groups are multiples of {aligned} rows, not of {BLOCK} (too few rows for so many groups)"
        )
    if x.shape[1] % _WIDTHS[-1] or w.shape[2] % _WIDTHS[-1]:
        raise dispatch.Unsupported(f"matrices of {w.shape[1:]} are not multiples of {_WIDTHS[-1]}")
    if x.dtype not in (jnp.float32, jnp.bfloat16):
        raise dispatch.Unsupported(f"operands are {x.dtype}, not float32 or bfloat16")
    num_E = (group_sizes // BLOCK).astype(jnp.int32)
    ends_E = jnp.cumsum(num_E).astype(jnp.int32)
    group_J = rows.group_of_rows(num_E, x.shape[0] // BLOCK).astype(jnp.int32)
    return _multiply(*varying.align([x, w, group_J, ends_E - num_E, ends_E]), interpret)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _multiply(x_MD, w_EDF, group_J, starts_E, ends_E, interpret):
    del starts_E, ends_E
    return _by_blocks(x_MD, w_EDF, group_J, interpret, transposed=False)


def _forward(x_MD, w_EDF, group_J, starts_E, ends_E, interpret):
    saved = (x_MD, w_EDF, group_J, starts_E, ends_E)
    return _multiply(*saved, interpret), saved


def _backward(interpret, saved, g_MF):
    x_MD, w_EDF, group_J, starts_E, ends_E = saved
    dx_MD = _by_blocks(g_MF, w_EDF, group_J, interpret, transposed=True)
    return dx_MD, _by_groups(x_MD, g_MF, starts_E, ends_E, interpret), None, None, None


_multiply.defvjp(_forward, _backward)


def _by_blocks(x_MD, w_EDF, group_J, interpret, *, transposed: bool):
    """y_j = x_j W[group], or x_j W[group]^T; zeros for group E, which there is not."""
    (M, D), E = x_MD.shape, len(w_EDF)
    F = w_EDF.shape[1 if transposed else 2]
    wide, deep = _piece(F, _WIDTHS), _piece(D, _DEPTHS[x_MD.dtype.itemsize])

    def kernel(group_ref, steps_ref, x_ref, w_ref, y_ref):
        group = group_ref[pl.program_id(0)]

        def step(k, sum_RF):
            part = pl.ds(k * deep, deep)
            w = w_ref[group, :, part].T if transposed else w_ref[group, part, :]
            return sum_RF + _dot(x_ref[:, part], w)

        zeros, steps = jnp.zeros((BLOCK, wide), jnp.float32), steps_ref[pl.program_id(0)]
        y_ref[...] = jax.lax.fori_loop(jnp.int32(0), steps, step, zeros).astype(y_ref.dtype)

    piece = (E, wide, D) if transposed else (E, D, wide)
    return _call(
        kernel,
        (M // BLOCK, F // wide),
        [
            *(pl.BlockSpec(group_J.shape, lambda j, n: (0,)) for _ in range(2)),
            pl.BlockSpec((BLOCK, D), lambda j, n: (j, 0)),
            pl.BlockSpec(piece, lambda j, n: (0, n, 0) if transposed else (0, 0, n)),
        ],
        pl.BlockSpec((BLOCK, wide), lambda j, n: (j, n)),
        (M, F),
        (group_J, jnp.where(group_J < E, D // deep, 0).astype(jnp.int32), x_MD, w_EDF),
        interpret,
        name="grouped_matmul_transposed" if transposed else "grouped_matmul",
    )


def _by_groups(x_MD, g_MF, starts_E, ends_E, interpret):
    """dW[e]: zeros for a group without blocks."""
    (M, D), F, E = x_MD.shape, g_MF.shape[1], len(starts_E)
    high, wide = _piece(D, _WIDTHS), _piece(F, _WIDTHS)
    deep = _DEPTHS[x_MD.dtype.itemsize][0]

    def kernel(start_ref, end_ref, x_ref, g_ref, dw_ref):
        e = pl.program_id(0)

        def step(k, sum_DF):
            part = pl.ds(k * deep, deep)
            return sum_DF + _dot(x_ref[part, :].T, g_ref[part, :])

        zeros = jnp.zeros((high, wide), jnp.float32)
        total = jax.lax.fori_loop(start_ref[e], end_ref[e], step, zeros)
        dw_ref[...] = total.astype(dw_ref.dtype)

    return _call(
        kernel,
        (E, D // high, F // wide),
        [
            *(pl.BlockSpec((E,), lambda e, d, f: (0,)) for _ in range(2)),
            pl.BlockSpec((M, high), lambda e, d, f: (0, d)),
            pl.BlockSpec((M, wide), lambda e, d, f: (0, f)),
        ],
        pl.BlockSpec((None, high, wide), lambda e, d, f: (e, d, f)),
        (E, D, F),
        (starts_E * (BLOCK // deep), ends_E * (BLOCK // deep), x_MD, g_MF),
        interpret,
        name="grouped_matmul_weights",
    )


def _call(kernel, grid, in_specs, out_spec, shape, arguments, interpret, *, name: str):
    *_, x, _ = arguments
    return pl.pallas_call(
        kernel,
        grid=grid,
        in_specs=in_specs,
        out_specs=out_spec,
        out_shape=varying.shape_like(shape, x.dtype, x),
        compiler_params=plgpu.CompilerParams(num_warps=8, num_stages=3),
        interpret=interpret,
        name=name,
    )(*arguments)


def _dot(a, b):
    """float32 operands keep their digits."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jnp.dot(a, b, precision=precision, preferred_element_type=jnp.float32)


def _piece(size: int, sizes: Sequence[int]) -> int:
    """The first of `sizes` that divides."""
    return next(piece for piece in sizes if size % piece == 0)
