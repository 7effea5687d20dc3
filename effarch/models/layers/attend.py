"""Causal attention of a batch on a mesh: each device has its rows, its heads and its queries.

Where time is split (axis `context`), keys and values of the whole row are gathered first; every device
then computes as much as the others. Heads and rows need no communication.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from effarch.kernels.attention import api as attention
from effarch.models.context import Context

QUERIES = ("batch", "time", "heads", None)
KEYS = ("batch", None, "heads", None)


def attend(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T G V"],
    ctx: Context,
    **options,
) -> Float[Array, "B T H V"]:
    """`kernels.attention` of tokens that attend to each other, in the order of their row."""
    is_split = ctx.layout is not None and ctx.layout.parts("time") > 1

    def on_pieces(q, k, v, segment_ids, kv_segment_ids):
        positions = {}
        if is_split:
            first = jax.lax.axis_index(ctx.layout.mesh_axes(("time",))[0]) * q.shape[1]
            positions["q_positions"] = _rows(first + jnp.arange(q.shape[1]), q)
            positions["kv_positions"] = _rows(jnp.arange(k.shape[1]), k)
        segments = dict(segment_ids=segment_ids, kv_segment_ids=kv_segment_ids)
        return (attention.attention(q, k, v, **segments, **positions, **options),)

    arrays = (q, k, v, ctx.segment_ids, ctx.segment_ids)
    inputs = (QUERIES, KEYS, KEYS, ("batch", "time"), ("batch", None))
    # Pieces of whole rows may go to JAX's own accelerator kernels, which fail the check.
    return ctx.local(on_pieces, arrays, inputs, (QUERIES,), checked=is_split)[0]


def _rows(index_T: jax.Array, like: jax.Array) -> jax.Array:
    return jnp.broadcast_to(index_T, like.shape[:2])
