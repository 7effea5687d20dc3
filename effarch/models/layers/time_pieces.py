"""A recurrence over a row that is cut in time, a piece a device.

What a piece does to the state that comes in is affine: S_out = M S_in + S_own. The kernel itself gives
S_own, from no state, and M, from the identity and values of zero. All devices exchange both, each
composes those of the pieces before its own, and runs its piece from the state that it found. Work a
device: three passes over its piece, whatever their number; sent: K (K + V) numbers a head and row.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def run(
    kernel: Callable,
    arrays: tuple,
    initial_state: Float[Array, "B HV K V"] | None,
    segment_ids: Int[Array, "B T"] | None,
    axes: tuple[str, ...],
):
    """o [B,T,HV,V] of this device's piece and the row's final state, the same on all devices.

    `kernel(q, k, v, g, ..., initial_state=, segment_ids=)` takes `arrays`; time is cut over the mesh
    `axes` of the surrounding `shard_map`.
    """
    q, k, v, *rest = arrays
    rows = dict(segment_ids=segment_ids)
    _, own = kernel(*arrays, initial_state=None, **rows)
    batch, heads, k_dim = own.shape[:3]
    identity = jnp.broadcast_to(jnp.eye(k_dim, dtype=own.dtype), (batch, heads, k_dim, k_dim))
    no_values = jnp.zeros((*v.shape[:3], k_dim), v.dtype)
    _, passed = kernel(q, k, no_values, *rest, initial_state=identity, **rows)
    owns, passes = (jax.lax.all_gather(x, axes) for x in (own, passed))
    state = jnp.zeros_like(own) if initial_state is None else initial_state
    incoming = _incoming(owns, passes, state, _ends(segment_ids, axes))
    index = jax.lax.axis_index(axes)
    o, final = kernel(*arrays, initial_state=incoming[index], **rows)
    is_last = index == owns.shape[0] - 1
    return o, jax.lax.psum(jnp.where(is_last, final, 0), axes)


def _incoming(owns, passes, state, ends) -> Float[Array, "pieces B HV K V"]:
    """The state before each piece; a document that begins with a piece starts from zero."""
    found, last = [], None
    for piece in range(owns.shape[0]):
        if ends is not None:
            first_B, last_B = ends[0][piece], ends[1][piece]
            if last is not None:
                goes_on = (first_B == last) | (first_B == 0) | (last == 0)
                state = jnp.where(goes_on[:, None, None, None], state, 0)
            last = last_B if last is None else jnp.where(last_B == 0, last, last_B)
        found.append(state)
        highest = jax.lax.Precision.HIGHEST
        state = jnp.einsum("bhij,bhjv->bhiv", passes[piece], state, precision=highest) + owns[piece]
    return jnp.stack(found)


def _ends(segment_ids, axes):
    """The first and last document of each piece, [pieces, B]; 0 if it is all padding."""
    if segment_ids is None:
        return None
    real_BT = segment_ids != 0
    first_B = jnp.argmax(real_BT, axis=1)
    last_B = segment_ids.shape[1] - 1 - jnp.argmax(real_BT[:, ::-1], axis=1)
    rows = jnp.arange(segment_ids.shape[0])
    return tuple(jax.lax.all_gather(segment_ids[rows, at], axes) for at in (first_B, last_B))
