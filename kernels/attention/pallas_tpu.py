"""Attention on TPUs by JAX's Splash kernels: blocks that nobody sees are skipped, in both passes.

Splash (jax.experimental.pallas.ops.tpu.splash_attention) has causal and local masks, segments, grouped
heads and a soft-cap. A query that sees no key would get the mean of what it does not see; a sink, one
more score per row that is far below all real ones, turns that into zeros with zero gradient.
"""

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as splash

from effarch.kernels import dispatch, varying
from effarch.kernels.attention import whole_rows

_BLOCKS = (512, 256, 128)
_LOWEST_SCORE = -1e30  # above Splash's score of what is masked, below every other


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
    """See `api.attention`. Queries are scaled before they are rounded to q's dtype.

    `interpret` runs the kernels without a TPU, step by step: for tests. What is saved for the gradient
    is called "attention_out" in the policies of `jax.checkpoint`.
    """
    whole_rows.check("tpu", q, q_positions, interpret)
    if varying.axes(q):
        raise dispatch.Unsupported(
            "Splash does not say over which mesh axes its outputs vary, as jax.shard_map asks unless "
            "check_vma=False"
        )
    length = q.shape[1]
    (q, k, v), segments = whole_rows.filled(
        (q, k, v), segment_ids, kv_segment_ids, _BLOCKS[-1], causal
    )
    q = (q.astype(jnp.float32) * scale).astype(q.dtype)
    kernel = _kernel(q.shape[1], k.shape[1], q.shape[2], causal, window, softcap, interpret)
    sinks = jnp.full(q.shape[2], _LOWEST_SCORE, jnp.float32)

    def row(q_THK, k_SGK, v_SGV, segments):
        by_head = (jnp.swapaxes(x, 0, 1) for x in (q_THK, k_SGK, v_SGV))
        ids = None if segments is None else splash.SegmentIds(*segments)
        return jnp.swapaxes(kernel(*by_head, ids, sinks), 0, 1)

    return jax.vmap(row)(q, k, v, segments)[:, :length]


def _kernel(T, S, H, causal, window, softcap, interpret):
    if window is not None:
        mask = splash.LocalMask((T, S), window_size=(window - 1, 0), offset=0)
    else:
        mask = splash.CausalMask((T, S)) if causal else splash.FullMask((T, S))
    q_block, kv_block = (next(x for x in _BLOCKS if length % x == 0) for length in (T, S))
    sizes = splash.BlockSizes(
        block_q=q_block,
        block_kv=kv_block,
        block_q_dkv=q_block,
        block_kv_dkv=kv_block,
        block_q_dq=q_block,
        block_kv_dq=kv_block,
    )
    return splash.make_splash_mha(
        splash.MultiHeadMask([mask] * H),
        block_sizes=sizes,
        attn_logits_soft_cap=softcap,
        head_shards=1,
        q_seq_shards=1,
        residual_checkpoint_name="attention_out",
        interpret=interpret,
    )
