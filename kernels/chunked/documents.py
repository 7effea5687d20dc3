"""Document boundaries of packed rows, as the masks that the chunked form needs.

Segment ids [B,T] are constant inside a document; 0 is padding, which belongs to no document and is
counted here as part of the document before it (front padding: of the first), because it writes
nothing. Documents are numbered 0, 1, 2, ... along a row, so that an id may return later in the row.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Boundaries(NamedTuple):
    """Which parts of a chunk see each other. N chunks of C tokens; True: same document."""

    pairs: jax.Array  # [N,B,C,C]  token i and token j
    reads: jax.Array  # [N,B,C]    token i and the state that enters the chunk
    writes: jax.Array  # [N,B,C]   token j and the last token of the chunk
    carries: jax.Array  # [N,B]    the entering state and the last token of the chunk


def document_index(segment_ids: jax.Array) -> jax.Array:
    """Number of the document each token belongs to, int32 [B,T], starting from 0 in every row."""
    is_real = segment_ids != 0
    time = jnp.arange(segment_ids.shape[1])
    last_real = jax.lax.cummax(jnp.where(is_real, time, -1), axis=1)
    first_real = jnp.argmax(is_real, axis=1)[:, None]
    source = jnp.where(last_real < 0, first_real, last_real)
    filled = jnp.take_along_axis(segment_ids, source, axis=1)
    changes = filled[:, 1:] != filled[:, :-1]
    return jnp.pad(jnp.cumsum(changes, axis=1, dtype=jnp.int32), ((0, 0), (1, 0)))


def boundaries(documents: jax.Array) -> Boundaries:
    """The masks for document numbers cut into chunks, [N,B,C]."""
    last = documents[:, :, -1]
    entering = jnp.concatenate([jnp.zeros_like(last[:1]), last[:-1]])
    return Boundaries(
        pairs=documents[..., :, None] == documents[..., None, :],
        reads=documents == entering[..., None],
        writes=documents == last[..., None],
        carries=last == entering,
    )
