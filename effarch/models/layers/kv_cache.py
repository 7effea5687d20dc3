"""The decode cache of softmax attention: a ring of named arrays with the positions of their tokens."""

from collections.abc import Mapping

import jax.numpy as jnp
from jaxtyping import Array, Int


def init(batch: int, length: int, shapes: Mapping[str, tuple[int, ...]], dtype) -> dict:
    """`length` empty slots a row for arrays of the given shape per token; position -1 is empty."""
    arrays = {name: jnp.zeros((batch, length, *shape), dtype) for name, shape in shapes.items()}
    return arrays | {"positions": jnp.full((batch, length), -1, jnp.int32)}


def new_positions(positions: Int[Array, "B T"], segment_ids: Int[Array, "B T"] | None):
    """The positions of the tokens at hand, -1 for padding."""
    return positions if segment_ids is None else jnp.where(segment_ids != 0, positions, -1)


def joined(cache: dict, new: Mapping[str, Array]) -> dict[str, Array]:
    """The slots of the cache followed by the new tokens, positions included."""
    return {
        name: jnp.concatenate([cache[name], x.astype(cache[name].dtype)], axis=1)
        for name, x in new.items()
    }


def append(cache: dict, new: Mapping[str, Array]) -> dict:
    """Writes the token of position p into slot p mod length; tokens of position -1 are dropped."""
    positions = new["positions"]
    length = cache["positions"].shape[1]
    last = jnp.max(positions, axis=1, keepdims=True)
    # Two tokens of one write never share a slot.
    kept = (positions >= 0) & (positions > last - length)
    slot = jnp.where(kept, positions % length, length)
    row = jnp.arange(positions.shape[0])[:, None]
    return {
        name: cache[name].at[row, slot].set(x.astype(cache[name].dtype), mode="drop")
        for name, x in new.items()
    }
