"""The delta rule, gated or not: the functions that layers call.

    S_t = (I - beta_t k_t k_t^T) diag(exp(g_t)) S_{t-1} + beta_t k_t v_t^T,    o_t = S_t^T (scale q_t)

DeltaNet (arXiv 2406.06484): g = None.  Gated DeltaNet (arXiv 2412.06464): g a number per head.
Kimi Delta Attention (arXiv 2510.26692): g a number per key channel. Inputs are used as they are: the
layer normalises q and k (with |k| = 1 any beta in [0, 2] is stable).
"""

import jax
import jax.numpy as jnp

from effarch.kernels import dispatch
from effarch.kernels.delta_rule import step

BACKENDS = ("reference", "xla")


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
    backend: "xla", "reference" (also for forward-mode derivatives) or None for the fastest.
    """
    q, k, v, beta = (jnp.asarray(x) for x in (q, k, v, beta))
    g = None if g is None else jnp.asarray(g)
    _check_floats(q=q, k=k, v=v, beta=beta, g=g, initial_state=initial_state)
    if q.ndim != 4 or v.ndim != 4:
        raise ValueError(
            f"gated_delta_rule: q {q.shape} and v {v.shape} must be [batch, time, heads, width]."
        )
    batch, length, heads, width = q.shape
    if length == 0:
        raise ValueError("gated_delta_rule: the time axis of q is empty; give at least one token.")
    value_heads = v.shape[2]
    _check_heads(heads, value_heads)
    row = (batch, length)
    _check_shape("k", k, q.shape)
    _check_shape("v", v, (*row, value_heads, v.shape[3]))
    _check_shape("beta", beta, (*row, value_heads))
    if g is not None:
        _check_shape("g", g, (*row, value_heads, width)[: 3 if g.ndim == 3 else 4])
    if initial_state is not None:
        initial_state = jnp.asarray(initial_state)
        _check_shape("initial_state", initial_state, (batch, value_heads, width, v.shape[3]))
    if segment_ids is not None:
        segment_ids = jnp.asarray(segment_ids)
        _check_shape("segment_ids", segment_ids, row)
        if not jnp.issubdtype(segment_ids.dtype, jnp.integer):
            raise ValueError(
                f"gated_delta_rule: segment_ids has dtype {segment_ids.dtype}; give integers."
            )
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(
            f"gated_delta_rule: chunk_size is {chunk_size}; give a positive number of tokens."
        )
    return dispatch.call(
        "delta_rule",
        "gated_delta_rule",
        BACKENDS,
        backend,
        *(q, k, v, beta, g),
        scale=width**-0.5 if scale is None else scale,
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
) -> tuple[jax.Array, jax.Array]:
    """One token, for decoding: o [B,HV,V] in v's dtype and the new state in the state's dtype.

    state [B,HV,K,V] float32; q, k [B,H,K]; v [B,HV,V]; beta [B,HV]; g None, [B,HV] or [B,HV,K].
    """
    state, q, k, v, beta = (jnp.asarray(x) for x in (state, q, k, v, beta))
    g = None if g is None else jnp.asarray(g)
    _check_floats(state=state, q=q, k=k, v=v, beta=beta, g=g)
    if q.ndim != 3 or v.ndim != 3:
        raise ValueError(
            f"gated_delta_rule_step: q {q.shape} and v {v.shape} must be [batch, heads, width]."
        )
    batch, heads, width = q.shape
    value_heads = v.shape[1]
    _check_heads(heads, value_heads)
    _check_shape("k", k, q.shape)
    _check_shape("v", v, (batch, value_heads, v.shape[2]))
    _check_shape("beta", beta, (batch, value_heads))
    _check_shape("state", state, (batch, value_heads, width, v.shape[2]))
    if g is not None:
        _check_shape("g", g, (batch, value_heads, width)[: 2 if g.ndim == 2 else 3])
    scale = width**-0.5 if scale is None else scale
    o, state = step.delta_step(state, q.astype(state.dtype), k, v, beta, g, scale)
    return o.astype(v.dtype), state


def _check_heads(heads: int, value_heads: int) -> None:
    if value_heads % heads:
        raise ValueError(
            f"gated_delta_rule: v has {value_heads} heads, which is not a multiple of the {heads} "
            "heads of q and k; give every key head the same number of value heads."
        )


def _check_shape(name: str, array: jax.Array, expected: tuple[int, ...]) -> None:
    if array.shape != expected:
        raise ValueError(
            f"gated_delta_rule: {name} has shape {array.shape}; with these q and v it must be "
            f"{expected}."
        )


def _check_floats(**arrays: jax.Array | None) -> None:
    for name, array in arrays.items():
        if array is not None and not jnp.issubdtype(array.dtype, jnp.floating):
            raise ValueError(
                f"gated_delta_rule: {name} has dtype {array.dtype}; give a floating-point array."
            )
