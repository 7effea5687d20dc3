"""Attention on GPUs as our own Pallas (Triton) kernels.

Ours because no other serves: JAX's (jax.experimental.pallas.ops.gpu.attention) is deprecated and has no
window, soft-cap or grouped heads; cuDNN (jax.nn.dot_product_attention) has segments only through a mask
of T x S floats and no soft-cap, and cannot be compiled without a GPU; none of them, and not Tokamax, can
be told the mesh axes over which its outputs vary.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from effarch.kernels import dispatch, varying
from effarch.kernels.attention import gpu_blocks, masks, whole_rows
from effarch.kernels.attention.gpu_blocks import BLOCK, Plan

_NARROWEST_HEAD, _WIDEST_HEAD = 16, 128
_QUERIES = 2 * BLOCK


def attention(
    q,
    k,
    v,
    *,
    causal,
    window,
    softcap,
    segment_ids,
    kv_segment_ids,
    q_positions,
    kv_positions,
    scale,
    interpret=False,
) -> jax.Array:
    """See `api.attention`. `interpret` runs the kernels without a GPU, step by step: for tests.

    What is saved for the gradient is called "attention_out" and "attention_lse" in the policies of
    `jax.checkpoint`.
    """
    whole_rows.check("gpu", q, q_positions, interpret)
    key, value = q.shape[-1], v.shape[-1]
    if max(key, value) > _WIDEST_HEAD:
        raise dispatch.Unsupported(f"heads of {key} and {value} are wider than {_WIDEST_HEAD}")
    inputs = [q, k, v, segment_ids, kv_segment_ids]
    *arrays, segment_ids, kv_segment_ids = varying.align(inputs)
    length = q.shape[1]
    arrays, segments = whole_rows.filled(arrays, segment_ids, kv_segment_ids, _QUERIES, causal)
    q, k, v = (_widened(x) for x in arrays)
    plan = Plan(
        options=masks.Options(causal, window, softcap, scale, BLOCK),
        queries=q.shape[1],
        keys=k.shape[1],
        heads=q.shape[2],
        segmented=segments is not None,
        interpret=interpret,
    )
    return _attend(q, k, v, segments, plan)[:, :length, :, :value]


def _widened(x):
    """Heads filled up with zeros to a power of two."""
    width = max(_NARROWEST_HEAD, 2 ** (x.shape[-1] - 1).bit_length())
    return jnp.pad(x, ((0, 0),) * 3 + ((0, width - x.shape[-1]),)) if width > x.shape[-1] else x


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(q, k, v, segments, plan):
    return _forward(q, k, v, segments, plan)[0]


def _forward(q, k, v, segments, plan):
    size, like = _QUERIES, q
    ids = [] if segments is None else [(segments[0], size), (segments[1], None)]
    o, lse = _call(
        *(gpu_blocks.forward, plan, plan.queries // size),
        [(q, size), (k, None), (v, None), *ids],
        [((*q.shape[:3], v.shape[3]), like.dtype, size), (_numbers(q), jnp.float32, size)],
        warps=8,
    )
    o, lse = checkpoint_name(o, "attention_out"), checkpoint_name(lse, "attention_lse")
    return o, (q, k, v, segments, o, lse)


def _backward(plan, saved, d_o):
    q, k, v, segments, o, lse = saved
    delta = jnp.einsum("bthv,bthv->bht", o.astype(jnp.float32), d_o.astype(jnp.float32))
    ids, kv_ids = ([], []) if segments is None else ([segments[0]], [segments[1]])

    def inputs(query_size, key_size):
        arrays = [q, k, v, d_o, lse, delta, *ids, *kv_ids]
        sizes = [query_size, *[key_size] * 2, *[query_size] * (3 + len(ids))]
        return list(zip(arrays, [*sizes, *[key_size] * len(kv_ids)]))

    group, heads = q.shape[2] // k.shape[2], q.shape[2]
    dtype = q.dtype if group == 1 else jnp.float32
    outputs = [((*x.shape[:2], heads, x.shape[3]), dtype, BLOCK) for x in (k, v)]
    kernel, count = gpu_blocks.backward_keys, plan.keys // BLOCK
    to_keys = _call(kernel, plan, count, inputs(None, BLOCK), outputs, warps=8)
    kernel, count = gpu_blocks.backward_queries, plan.queries // BLOCK
    outputs = [(q.shape, q.dtype, BLOCK)]
    (d_q,) = _call(kernel, plan, count, inputs(BLOCK, None), outputs, warps=4)
    d_k, d_v = (
        jnp.sum(x.reshape(*x.shape[:2], -1, group, x.shape[3]), axis=3).astype(k.dtype)
        for x in to_keys
    )
    no_ids = None
    if segments is not None:
        no_ids = tuple(np.zeros(x.shape, jax.dtypes.float0) for x in segments)
    return d_q, d_k, d_v, no_ids


_attend.defvjp(_forward, _backward)


def _numbers(q):
    """One for each query and head: [B,H,T]."""
    return q.shape[0], q.shape[2], q.shape[1]


def _call(kernel, plan, count, inputs, outputs, *, warps):
    """Runs `kernel(plan, *refs)` on a grid of `count` blocks and B*H heads.

    Inputs are (array, tokens of a block or None for all), outputs (shape, dtype, tokens).
    """
    like = inputs[0][0]
    return pl.pallas_call(
        functools.partial(kernel, plan),
        grid=(count, like.shape[0] * plan.heads),
        in_specs=[_spec(plan, array.shape, size) for array, size in inputs],
        out_specs=[_spec(plan, shape, size) for shape, _, size in outputs],
        out_shape=[varying.shape_like(shape, dtype, like) for shape, dtype, _ in outputs],
        compiler_params=plgpu.CompilerParams(num_warps=warps, num_stages=2),
        interpret=plan.interpret,
        name=f"attention_{kernel.__name__}",
    )(*(array for array, _ in inputs))


def _spec(plan, shape, size) -> pl.BlockSpec:
    """Tokens of one head of [B,T,heads,width] or [B,heads,T], or of a row of [B,T]."""
    heads = plan.heads

    def at(i):
        return i if size else 0

    if len(shape) == 2:
        return pl.BlockSpec((None, size or shape[1]), lambda i, r: (r // heads, at(i)))
    if len(shape) == 3:
        block = (None, None, size or shape[2])
        return pl.BlockSpec(block, lambda i, r: (r // heads, r % heads, at(i)))
    share = heads // shape[2]
    block = (None, size or shape[1], None, shape[3])
    return pl.BlockSpec(block, lambda i, r: (r // heads, at(i), r % heads // share, 0))
