"""The delta rule, gated or not: the functions that layers call.

    S_t = (I - beta_t k_t k_t^T) diag(exp(g_t)) S_{t-1} + beta_t k_t v_t^T,    o_t = S_t^T (scale q_t)

DeltaNet (arXiv 2406.06484): g = None.  Gated DeltaNet (arXiv 2412.06464): g a number per head.
Kimi Delta Attention (arXiv 2510.26692): g a number per key channel. Inputs are used as they are: the
layer normalises q and k (with |k| = 1 any beta in [0, 2] is stable).
"""

import jax
import jax.numpy as jnp

from effarch.kernels import dispatch, recurrent_arguments

BACKENDS = ("reference", "xla", "pallas_tpu", "pallas_tpu_precise", "pallas_gpu")
STEP_BACKENDS = ("xla", "pallas_tpu", "pallas_gpu")


def gated_delta_rule(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    beta: jax.Array,
    g: jax.Array | None = None,
    *,
    scale: float | None = None,
    initial_state: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    chunk_size: int | None = None,
    backend: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Outputs o [B,T,HV,V] in v's dtype and the final state [B,HV,K,V].

    q, k [B,T,H,K]; v [B,T,HV,V]; beta [B,T,HV]. HV is a multiple of H: value head h reads key head
    h // (HV // H). scale (default K**-0.5) multiplies q only.
    g: log decay, at most 0: None (no decay), [B,T,HV] or [B,T,HV,K].
    initial_state [B,HV,K,V] belongs to the first segment of each row.
    segment_ids [B,T], integer: constant inside a document; nothing passes from one document to the
    next. 0 is padding, anywhere in the row: outputs 0, the state passes it unchanged.
    The final state is the one after the row's last token that is not padding. It is float32
    (float64 for float64 inputs, which are computed in float64; all others in float32).
    chunk_size: tokens that the chunked backends treat at once, None for the device's best.
    backend: "xla", "reference" (also for forward-mode derivatives), "pallas_tpu", "pallas_gpu" or None
    for the fastest. The Pallas kernels multiply bfloat16 inputs in one pass (errors of 3e-3, or 2e-2
    where keys are alike; "pallas_tpu_precise": 7e-3, for 1.4 times the bundles of the forward). On a TPU
    float32 inputs keep their digits, and a channel's decay below 2^-30 a token counts as 2^-30.
    "pallas_gpu" takes bfloat16 inputs and keys of at most 128, and leaves the rest to xla.
    """
    q, k, v, beta = (jnp.asarray(x) for x in (q, k, v, beta))
    g, initial_state, segment_ids = (
        None if x is None else jnp.asarray(x) for x in (g, initial_state, segment_ids)
    )
    recurrent_arguments.check_rows(
        *("gated_delta_rule", q, k, v, g, initial_state, segment_ids, chunk_size), beta=beta
    )
    return dispatch.call(
        "delta_rule",
        "gated_delta_rule",
        BACKENDS,
        backend,
        *(q, k, v, beta, g),
        scale=q.shape[-1] ** -0.5 if scale is None else scale,
        initial_state=initial_state,
        segment_ids=segment_ids,
        chunk_size=chunk_size,
    )


def gated_delta_rule_step(
    state: jax.Array,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    beta: jax.Array,
    g: jax.Array | None = None,
    *,
    scale: float | None = None,
    backend: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """One token, for decoding: o [B,HV,V] in v's dtype and the new state in the state's dtype.

    state [B,HV,K,V] float32; q, k [B,H,K]; v [B,HV,V]; beta [B,HV]; g None, [B,HV] or [B,HV,K].
    backend: "xla", "pallas_tpu", "pallas_gpu" or None for the fastest; the Pallas kernels write the
    new state over the old one where that is donated, and have no gradient.
    """
    state, q, k, v, beta = (jnp.asarray(x) for x in (state, q, k, v, beta))
    g = None if g is None else jnp.asarray(g)
    recurrent_arguments.check_token("gated_delta_rule_step", state, q, k, v, g, beta=beta)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    name = "gated_delta_rule_step"
    arrays = (state, q, k, v, beta, g)
    return dispatch.call("delta_rule", name, STEP_BACKENDS, backend, *arrays, scale=scale)
