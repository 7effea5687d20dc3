"""Value heads that are wider than a kernel takes, as several that share keys, decays and writes.

The columns of a state do not meet: o[:, j] and S[:, j] of a head depend on v[:, j] alone.
Legend: P pieces of a value head, each of V / P channels, filled up with zeros where that is not whole.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp


def split(
    v: jax.Array,
    per_head: Sequence[jax.Array | None],
    state: jax.Array | None,
    pieces: int,
) -> tuple[jax.Array, list[jax.Array | None], jax.Array | None]:
    """v [B,T,HV,V], arrays [B,T,HV,...] and the state [B,HV,K,V] with P HV in place of HV heads."""
    batch, length, heads, width = v.shape
    piece = -(-width // pieces)
    fill = [(0, 0)] * 3 + [(0, pieces * piece - width)]
    v = jnp.pad(v, fill).reshape(batch, length, heads * pieces, piece)
    per_head = [None if x is None else jnp.repeat(x, pieces, axis=2) for x in per_head]
    if state is not None:
        state = jnp.pad(state, fill).reshape(batch, heads, -1, pieces, piece)
        state = jnp.moveaxis(state, 3, 2).reshape(batch, heads * pieces, -1, piece)
    return v, per_head, state


def join(o: jax.Array, state: jax.Array, pieces: int, width: int) -> tuple[jax.Array, jax.Array]:
    """The inverse: o [B,T,HV,V] and the state [B,HV,K,V] from those of P HV heads."""
    batch, length, heads, piece = o.shape
    o = o.reshape(batch, length, heads // pieces, pieces * piece)[..., :width]
    state = jnp.moveaxis(state.reshape(batch, heads // pieces, pieces, -1, piece), 2, 3)
    return o, state.reshape(*state.shape[:3], pieces * piece)[..., :width]
