"""Softmax attention, the public function: checks its arguments and picks a backend.

    s_ij = c tanh(scale q_i . k_j / c)      (without a softcap: scale q_i . k_j)
    o_i  = sum_j softmax_j(s_ij) v_j        over the keys j that query i may see

Full attention: arXiv 1706.03762; grouped heads: 2305.13245; window and softcap as in Gemma 2,
2408.00118.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from effarch.kernels import dispatch

BACKENDS = ("xla", "reference", "pallas_tpu", "pallas_gpu")


def attention(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B S G K"],
    v: Float[Array, "B S G V"],
    *,
    causal: bool = True,
    window: int | None = None,
    softcap: float | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    kv_segment_ids: Int[Array, "B S"] | None = None,
    q_positions: Int[Array, "B T"] | None = None,
    kv_positions: Int[Array, "B S"] | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> Float[Array, "B T H V"]:
    """Softmax attention with H query heads over G key/value heads; the result has q's dtype.

    Query head h reads key head h // (H // G). Query i sees key j if
      - causal: j <= i; with positions: 0 <= kv_positions[j] <= q_positions[i], so that the slots of
        a cache may stand in any order and a negative position marks an empty slot;
      - window w (tokens, needs causal): also i - j < w: itself and the w - 1 tokens before it;
      - segment_ids: both are of one segment. Segment 0 is padding: seen by nobody, seeing nobody.
        `kv_segment_ids` defaults to `segment_ids` where T == S.
    With positions and causal=False every slot that is not empty is seen. A query that sees no key
    gives zeros and has zero gradient. `scale` defaults to K**-0.5. Products take operands of the
    inputs' dtype; sums, softmax and its statistics are float32.

    The training path (no positions) has its own backward: reverse mode only; `backend="reference"`
    also does forward mode and second derivatives. "pallas_tpu" (JAX's Splash) and "pallas_gpu", chosen
    by themselves, take bfloat16 and no positions; xla does the rest. Raises ValueError for arguments
    that do not fit.
    """
    if segment_ids is not None and kv_segment_ids is None:
        if q.shape[1] != k.shape[1]:
            raise ValueError(
                f"attention: segment_ids is given for {q.shape[1]} queries but there are "
                f"{k.shape[1]} keys; pass kv_segment_ids as well."
            )
        kv_segment_ids = segment_ids
    _check_shapes(q, k, v)
    _check_rows(q, k, segment_ids, kv_segment_ids, q_positions, kv_positions)
    _check_options(q, k, causal, window, softcap, q_positions)
    return dispatch.call(
        "attention",
        "attention",
        BACKENDS,
        backend,
        q,
        k,
        v,
        causal=causal,
        window=window,
        softcap=None if softcap is None else float(softcap),
        segment_ids=segment_ids,
        kv_segment_ids=kv_segment_ids,
        q_positions=q_positions,
        kv_positions=kv_positions,
        scale=q.shape[-1] ** -0.5 if scale is None else float(scale),
    )


def _check_shapes(q: jax.Array, k: jax.Array, v: jax.Array) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4:
            raise ValueError(
                f"attention: {name} has shape {x.shape}; give [batch, time, heads, width]."
            )
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(f"attention: {name} is {x.dtype}; give a floating-point array.")
        if x.dtype != q.dtype:
            raise ValueError(
                f"attention: {name} is {x.dtype} but q is {q.dtype}; cast them to one dtype."
            )
    if k.shape[:3] != v.shape[:3] or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(
            f"attention: q {q.shape}, k {k.shape} and v {v.shape} do not fit; give q [B,T,H,K], "
            "k [B,S,G,K] and v [B,S,G,V]."
        )
    if q.shape[2] % k.shape[2]:
        raise ValueError(
            f"attention: {q.shape[2]} query heads cannot share {k.shape[2]} key heads; use a "
            "multiple."
        )


def _check_rows(q, k, segment_ids, kv_segment_ids, q_positions, kv_positions) -> None:
    rows = (
        ("segment_ids", segment_ids, q.shape[:2]),
        ("kv_segment_ids", kv_segment_ids, k.shape[:2]),
        ("q_positions", q_positions, q.shape[:2]),
        ("kv_positions", kv_positions, k.shape[:2]),
    )
    for name, x, shape in rows:
        if x is not None and (x.shape != shape or not jnp.issubdtype(x.dtype, jnp.integer)):
            raise ValueError(
                f"attention: {name} is {x.dtype}{list(x.shape)}; give integers of shape "
                f"{list(shape)}."
            )
    pairs = (
        ("segment_ids", segment_ids, "kv_segment_ids", kv_segment_ids),
        ("q_positions", q_positions, "kv_positions", kv_positions),
    )
    for name, x, kv_name, kv in pairs:
        if (x is None) != (kv is None):
            given, missing = (kv_name, name) if x is None else (name, kv_name)
            raise ValueError(f"attention: {given} is given without {missing}; give both.")


def _check_options(q, k, causal, window, softcap, q_positions) -> None:
    if causal and q_positions is None and q.shape[1] != k.shape[1]:
        raise ValueError(
            f"attention: {q.shape[1]} queries and {k.shape[1]} keys have no common index; give "
            "q_positions and kv_positions, or causal=False."
        )
    if window is not None and (isinstance(window, bool) or int(window) != window or window < 1):
        raise ValueError(f"attention: window is {window}; give a whole number of tokens >= 1.")
    if window is not None and not causal:
        raise ValueError(f"attention: window={window} needs causal=True; leave window at None.")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"attention: softcap is {softcap}; give a number > 0, or None for none.")
