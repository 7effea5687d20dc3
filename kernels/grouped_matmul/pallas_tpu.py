"""Grouped matrix product on TPUs: rows lie in blocks of one group each, so no block needs a mask.

    y_j = x_j W[group of j]        dx_j = g_j W[group of j]^T        dW[e] = sum over j of e of x_j^T g_j

The idea of MegaBlocks' block-sparse products, arXiv 2211.15841, and of JAX's megablox, whose kernels
are not used: they take no mesh axes inside `shard_map`, and visit a block once for each group in it.
A matrix is fetched once for all consecutive blocks of its group; sums are float32 in fast memory.

Legend: J = blocks, R = rows of a block.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from effarch.kernels import dispatch, platform, varying
from effarch.kernels.grouped_matmul import rows
from effarch.kernels.grouped_matmul.api import BLOCK

_MATRIX_BYTES = 4 * 2**20
"""Of the piece of a matrix that is in fast memory."""
_LANES = 128


def grouped_matmul(x, w, group_sizes, *, aligned, interpret=False):
    """See `api.grouped_matmul`. `interpret` runs the kernels without a TPU: for tests."""
    if not interpret and platform.current() != "tpu":
        raise dispatch.Unsupported(f"it runs on TPUs, and this program is for {platform.current()}")
    if aligned % BLOCK:
        raise dispatch.Unsupported(
            f"groups are multiples of {aligned} rows, not of {BLOCK} (too few rows for so many groups)"
        )
    if x.shape[1] % _LANES or w.shape[2] % _LANES:
        raise dispatch.Unsupported(f"matrices of {w.shape[1:]} are not multiples of {_LANES}")
    if x.dtype not in (jnp.float32, jnp.bfloat16):
        raise dispatch.Unsupported(f"operands are {x.dtype}, not float32 or bfloat16")
    return _multiply(*varying.align([x, w, *_blocks(group_sizes, x.shape[0])]), interpret)


def _blocks(sizes_E, num_rows: int):
    """The group of each block [J], how many blocks are in use [1], and which groups have any [E]."""
    num_E = sizes_E // BLOCK
    group_J = rows.group_of_rows(num_E, num_rows // BLOCK)
    group_J = jnp.minimum(group_J, len(sizes_E) - 1).astype(jnp.int32)
    return group_J, jnp.sum(num_E)[None].astype(jnp.int32), num_E > 0


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _multiply(x_MD, w_EDF, group_J, used_1, has_rows_E, interpret):
    del has_rows_E
    return _by_blocks(x_MD, w_EDF, group_J, used_1, interpret, transposed=False)


def _forward(x_MD, w_EDF, group_J, used_1, has_rows_E, interpret):
    saved = (x_MD, w_EDF, group_J, used_1, has_rows_E)
    return _multiply(*saved, interpret), saved


def _backward(interpret, saved, g_MF):
    x_MD, w_EDF, group_J, used_1, has_rows_E = saved
    dx_MD = _by_blocks(g_MF, w_EDF, group_J, used_1, interpret, transposed=True)
    dw_EDF = _by_groups(x_MD, g_MF, len(w_EDF), group_J, used_1, interpret)
    dw_EDF = jnp.where(has_rows_E[:, None, None], dw_EDF, 0)  # else nothing was written
    return dx_MD, dw_EDF, None, None, None


_multiply.defvjp(_forward, _backward)


def _by_blocks(x_MD, w_EDF, group_J, used_1, interpret, *, transposed: bool):
    """y_j = x_j W[group], or x_j W[group]^T; zeros where a block is not in use."""
    M, D = x_MD.shape
    F = w_EDF.shape[1 if transposed else 2]
    deep = _piece(D, _MATRIX_BYTES // (_LANES * x_MD.dtype.itemsize))
    wide = _piece(F, _MATRIX_BYTES // (deep * x_MD.dtype.itemsize))
    contract = ((1,), (1 if transposed else 0,))

    def kernel(group_J, used_1, x_ref, w_ref, y_ref, sum_ref):
        del group_J
        step, is_used = pl.program_id(2), pl.program_id(1) < used_1[0]

        @pl.when(step == 0)
        def _():
            sum_ref[...] = jnp.zeros_like(sum_ref)

        @pl.when(is_used)
        def _():
            sum_ref[...] += _dot(x_ref[...], w_ref[...], contract)

        @pl.when(step == D // deep - 1)
        def _():
            y_ref[...] = sum_ref[...].astype(y_ref.dtype)

    def of_matrix(n, j, k, group_J, used_1):
        del used_1
        return (group_J[j], n, k) if transposed else (group_J[j], k, n)

    return _call(
        kernel,
        (F // wide, M // BLOCK, D // deep),
        [
            pl.BlockSpec((BLOCK, deep), lambda n, j, k, *_: (j, k)),
            pl.BlockSpec((None, wide, deep) if transposed else (None, deep, wide), of_matrix),
        ],
        pl.BlockSpec((BLOCK, wide), lambda n, j, k, *_: (j, n)),
        (M, F),
        (BLOCK, wide),
        (group_J, used_1, x_MD, w_EDF),
        # The sum over k must follow itself; blocks of a group should, to keep their matrix.
        ("parallel", "arbitrary", "arbitrary"),
        interpret,
        name="grouped_matmul_transposed" if transposed else "grouped_matmul",
    )


def _by_groups(x_MD, g_MF, E: int, group_J, used_1, interpret):
    """dW[e]; groups without rows are left unwritten."""
    (M, D), F = x_MD.shape, g_MF.shape[1]
    J = M // BLOCK
    deep, wide = _piece(D, 512), _piece(F, 1024)

    def kernel(group_J, used_1, x_ref, g_ref, dw_ref, sum_ref):
        j = pl.program_id(2)
        group = group_J[j]

        @pl.when((j == 0) | (group != group_J[jnp.maximum(j - 1, 0)]))
        def _():
            sum_ref[...] = jnp.zeros_like(sum_ref)

        @pl.when(j < used_1[0])
        def _():
            sum_ref[...] += _dot(x_ref[...], g_ref[...], ((0,), (0,)))

        @pl.when((j == J - 1) | (group != group_J[jnp.minimum(j + 1, J - 1)]))
        def _():
            dw_ref[...] = sum_ref[...].astype(dw_ref.dtype)

    return _call(
        kernel,
        (D // deep, F // wide, J),
        [
            pl.BlockSpec((BLOCK, deep), lambda d, f, j, *_: (j, d)),
            pl.BlockSpec((BLOCK, wide), lambda d, f, j, *_: (j, f)),
        ],
        pl.BlockSpec((None, deep, wide), lambda d, f, j, group_J, *_: (group_J[j], d, f)),
        (E, D, F),
        (deep, wide),
        (group_J, used_1, x_MD, g_MF),
        ("parallel", "parallel", "arbitrary"),
        interpret,
        name="grouped_matmul_weights",
    )


def _call(kernel, grid, in_specs, out_spec, shape, sums, arguments, order, interpret, *, name):
    *_, x, other = arguments
    work = 2 * x.size * (other.shape[-1] if len(shape) == 3 else shape[-1])
    return pl.pallas_call(
        kernel,
        out_shape=varying.shape_like(shape, x.dtype, x),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=grid,
            in_specs=in_specs,
            out_specs=out_spec,
            scratch_shapes=[pltpu.VMEM(sums, jnp.float32)],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=order, vmem_limit_bytes=48 * 2**20
        ),
        cost_estimate=pl.CostEstimate(
            flops=work,
            transcendentals=0,
            bytes_accessed=x.nbytes + other.nbytes + x.dtype.itemsize * math.prod(shape),
        ),
        interpret=interpret,
        name=name,
    )(*arguments)


def _dot(a, b, contract):
    """float32 operands keep their digits; bfloat16 ones take one pass of the matrix unit."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jax.lax.dot_general(
        a, b, (contract, ((), ())), precision=precision, preferred_element_type=jnp.float32
    )


def _piece(size: int, most: int) -> int:
    """The largest multiple of the lanes that divides `size` and is at most `most`."""
    lanes = size // _LANES
    return _LANES * max(n for n in range(1, lanes + 1) if lanes % n == 0 and n * _LANES <= most)
