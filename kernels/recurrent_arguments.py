"""What the recurrent kernels with a matrix state ask of their arguments, in words.

`op` is the name of the function that was called; every error is a ValueError that begins with it.
"""

import jax
import jax.numpy as jnp


def check_rows(
    op: str,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    g: jax.Array | None,
    initial_state: jax.Array | None,
    segment_ids: jax.Array | None,
    chunk_size: int | None,
    **per_head: jax.Array,
) -> None:
    """q, k [B,T,H,K]; v [B,T,HV,V]; g None, [B,T,HV] or [B,T,HV,K]; `per_head` arrays [B,T,HV]."""
    check_floats(op, q=q, k=k, v=v, g=g, initial_state=initial_state, **per_head)
    if q.ndim != 4 or v.ndim != 4:
        raise ValueError(f"{op}: q {q.shape} and v {v.shape} must be [batch, time, heads, width].")
    batch, length, heads, width = q.shape
    if length == 0:
        raise ValueError(f"{op}: the time axis of q is empty; give at least one token.")
    value_heads = v.shape[2]
    _check_heads(op, heads, value_heads)
    row = (batch, length)
    check_shape(op, "k", k, q.shape)
    check_shape(op, "v", v, (*row, value_heads, v.shape[3]))
    for name, array in per_head.items():
        check_shape(op, name, array, (*row, value_heads))
    if g is not None:
        check_shape(op, "g", g, (*row, value_heads, width)[: 3 if g.ndim == 3 else 4])
    check_shape(op, "initial_state", initial_state, (batch, value_heads, width, v.shape[3]))
    check_segment_ids(op, segment_ids, row)
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"{op}: chunk_size is {chunk_size}; give a positive number of tokens.")


def check_token(
    op: str,
    state: jax.Array,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    g: jax.Array | None,
    **per_head: jax.Array,
) -> None:
    """state [B,HV,K,V]; q, k [B,H,K]; v [B,HV,V]; g None, [B,HV] or [B,HV,K]; others [B,HV]."""
    check_floats(op, state=state, q=q, k=k, v=v, g=g, **per_head)
    if q.ndim != 3 or v.ndim != 3:
        raise ValueError(f"{op}: q {q.shape} and v {v.shape} must be [batch, heads, width].")
    batch, heads, width = q.shape
    value_heads = v.shape[1]
    _check_heads(op, heads, value_heads)
    check_shape(op, "k", k, q.shape)
    check_shape(op, "v", v, (batch, value_heads, v.shape[2]))
    for name, array in per_head.items():
        check_shape(op, name, array, (batch, value_heads))
    check_shape(op, "state", state, (batch, value_heads, width, v.shape[2]))
    if g is not None:
        check_shape(op, "g", g, (batch, value_heads, width)[: 2 if g.ndim == 2 else 3])


def check_shape(op: str, name: str, array: jax.Array | None, expected: tuple[int, ...]) -> None:
    """None fits always."""
    if array is not None and array.shape != expected:
        raise ValueError(
            f"{op}: {name} has shape {array.shape}; with the other arguments it must be {expected}."
        )


def check_floats(op: str, **arrays: jax.Array | None) -> None:
    """Every array that is given holds floating-point numbers."""
    for name, array in arrays.items():
        if array is not None and not jnp.issubdtype(array.dtype, jnp.floating):
            raise ValueError(f"{op}: {name} has dtype {array.dtype}; give a floating-point array.")


def check_segment_ids(op: str, segment_ids: jax.Array | None, row: tuple[int, int]) -> None:
    """Integers [B,T], or None."""
    check_shape(op, "segment_ids", segment_ids, row)
    if segment_ids is not None and not jnp.issubdtype(segment_ids.dtype, jnp.integer):
        raise ValueError(f"{op}: segment_ids has dtype {segment_ids.dtype}; give integers.")


def _check_heads(op: str, heads: int, value_heads: int) -> None:
    if value_heads % heads:
        raise ValueError(
            f"{op}: v has {value_heads} heads, which is not a multiple of the {heads} heads of q "
            "and k; give every key head the same number of value heads."
        )
