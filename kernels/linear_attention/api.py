"""Linear attention with or without decay: the functions that layers call.

    S_t = diag(exp(g_t)) S_{t-1} + k_t v_t^T,    o_t = S_t^T (scale q_t)

Linear transformers (arXiv 2006.16236): g = None.  RetNet (arXiv 2307.08621): g a constant of each
head.  Mamba-2 / SSD (arXiv 2405.21060): a number per head and token.  GLA (arXiv 2312.06635) and
HGRN2 (arXiv 2404.07904): a number per key channel and token. Inputs are used as they are: feature
maps, normalisers and rotations are the layer's business.
"""

import jax
import jax.numpy as jnp

from effarch.kernels import dispatch, recurrent_arguments

BACKENDS = ("reference", "xla", "pallas_tpu", "pallas_gpu")
STEP_BACKENDS = ("xla", "pallas_tpu", "pallas_gpu")


def linear_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    g: jax.Array | None = None,
    *,
    scale: float | None = None,
    initial_state: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    chunk_size: int | None = None,
    backend: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Outputs o [B,T,HV,V] in v's dtype and the final state [B,HV,K,V].

    q, k [B,T,H,K]; v [B,T,HV,V]. HV is a multiple of H: value head h reads key head h // (HV // H).
    scale (default K**-0.5) multiplies q only.
    g: log decay, at most 0: None (no decay), [HV], [B,T,HV] or [B,T,HV,K].
    initial_state [B,HV,K,V] belongs to the first segment of each row.
    segment_ids [B,T], integer: constant inside a document; nothing passes from one document to the
    next. 0 is padding, anywhere in the row: outputs 0, the state passes it unchanged.
    The final state is the one after the row's last token that is not padding. It is float32
    (float64 for float64 inputs, which are computed in float64; all others in float32).
    chunk_size: tokens that the chunked backends treat at once, None for the device's best.
    backend: "xla", "reference" (also for forward-mode derivatives), "pallas_tpu", "pallas_gpu" or None
    for the fastest. The Pallas kernels multiply bfloat16 inputs in one pass; on a TPU float32 inputs
    keep their digits. "pallas_gpu" takes bfloat16 inputs and keys of at most 128, and leaves the rest
    to xla.
    """
    q, k, v = (jnp.asarray(x) for x in (q, k, v))
    g, initial_state, segment_ids = (
        None if x is None else jnp.asarray(x) for x in (g, initial_state, segment_ids)
    )
    if g is not None and g.ndim == 1 and v.ndim == 4:
        recurrent_arguments.check_shape("linear_attention", "g", g, v.shape[2:3])
        g = jnp.broadcast_to(g, v.shape[:3])
    recurrent_arguments.check_rows(
        "linear_attention", q, k, v, g, initial_state, segment_ids, chunk_size
    )
    return dispatch.call(
        "linear_attention",
        "linear_attention",
        BACKENDS,
        backend,
        *(q, k, v, g),
        scale=q.shape[-1] ** -0.5 if scale is None else scale,
        initial_state=initial_state,
        segment_ids=segment_ids,
        chunk_size=chunk_size,
    )


def linear_attention_step(
    state: jax.Array,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    g: jax.Array | None = None,
    *,
    scale: float | None = None,
    backend: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """One token, for decoding: o [B,HV,V] in v's dtype and the new state in the state's dtype.

    state [B,HV,K,V] float32; q, k [B,H,K]; v [B,HV,V]; g None, [HV], [B,HV] or [B,HV,K].
    backend: "xla", "pallas_tpu", "pallas_gpu" or None for the fastest; the Pallas kernels write the
    new state over the old one where that is donated, and have no gradient.
    """
    state, q, k, v = (jnp.asarray(x) for x in (state, q, k, v))
    g = None if g is None else jnp.asarray(g)
    if g is not None and g.ndim == 1 and v.ndim == 3:
        recurrent_arguments.check_shape("linear_attention_step", "g", g, v.shape[1:2])
        g = jnp.broadcast_to(g, v.shape[:2])
    recurrent_arguments.check_token("linear_attention_step", state, q, k, v, g)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    name = "linear_attention_step"
    arrays = (state, q, k, v, g)
    return dispatch.call("linear_attention", name, STEP_BACKENDS, backend, *arrays, scale=scale)
