"""What the accelerators' attention kernels ask of a call, and rows of whole blocks for them."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from effarch.kernels import dispatch
from effarch.kernels.attention import masks


def check(wanted: str, q: jax.Array, q_positions: jax.Array | None, interpret: bool) -> None:
    """Raises `Unsupported` for another platform than `wanted`, decoding, and float32."""
    dispatch.require(wanted, interpret)
    if q_positions is not None:
        raise dispatch.Unsupported("queries and keys with positions (decoding) are for xla")
    if not interpret and q.dtype != jnp.bfloat16:
        raise dispatch.Unsupported(f"it rounds to bfloat16, and q, k and v are {q.dtype}")


def filled(
    arrays: Sequence[jax.Array],
    segment_ids: jax.Array | None,
    kv_segment_ids: jax.Array | None,
    block: int,
    causal: bool,
) -> tuple[list[jax.Array], tuple[jax.Array, jax.Array] | None]:
    """q, k, v with time filled up to whole blocks, and (ids of queries, ids of keys) or None.

    Nobody sees a key of segment 0 or one that was filled in.
    """
    q, k, v = (_filled(x, block) for x in arrays)
    if segment_ids is None:
        if causal or k.shape[1] == arrays[1].shape[1]:
            return [q, k, v], None
        segment_ids, kv_segment_ids = (jnp.ones(x.shape[:2], jnp.int32) for x in arrays[:2])
    ids, kv_ids = (_filled(x.astype(jnp.int32), block) for x in (segment_ids, kv_segment_ids))
    return [q, k, v], (ids, masks.hide_padding(kv_ids))


def _filled(x, block):
    missing = -x.shape[1] % block
    return jnp.pad(x, ((0, 0), (0, missing)) + ((0, 0),) * (x.ndim - 2)) if missing else x
