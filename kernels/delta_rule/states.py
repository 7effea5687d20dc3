"""The only sequential part of the chunked delta rule: the state from chunk to chunk, both ways.

With S the state that enters a chunk, W and U the solved read keys and values, K the write keys,
w the write factors and c the carry factor:

    forward:   V' = U - W S            S  <- c S  + K^T (w V')
    backward:  dV' = dV'_local + w (K dS)    dS <- c dS + dS_local - W^T dV'

Legend: N chunks, B batch, H key heads, R value heads per key head, C tokens of a chunk, K and V head
widths. K is [N,B,H,C,K] where the value heads share it and [N,B,H,R,C,K] where they do not.
"""

import functools

import jax
import jax.numpy as jnp


def forward(solved_keys, solved_values, keys, write, carry, initial, precision):
    """All entering states [N,B,H,R,K,V], all V' [N,B,H,R,C,V] and the final state.

    `write` is [N,B,H,R,C] or None for ones, `carry` [N,B,H,R,1|K].
    """
    einsum = functools.partial(jnp.einsum, precision=precision)
    axes = _key_axes(keys)

    def step(state, chunk):
        w, u, k, write, carry = chunk
        new = u - einsum("bhrck,bhrkv->bhrcv", w, state)
        written = new if write is None else write[..., None] * new
        after = carry[..., None] * state + einsum(f"{axes},bhrcv->bhrkv", k, written)
        return after, (state, new)

    chunks = (solved_keys, solved_values, keys, write, carry)
    final, (states, new_values) = jax.lax.scan(step, initial, chunks)
    return states, new_values, final


def backward(solved_keys, keys, write, carry, d_new_local, d_state_local, d_final, precision):
    """dS at the end of every chunk [N,B,H,R,K,V], all dV' [N,B,H,R,C,V] and d initial state."""
    einsum = functools.partial(jnp.einsum, precision=precision)
    axes = _key_axes(keys)

    def step(d_state, chunk):
        w, k, write, carry, d_new_local, d_state_local = chunk
        d_written = einsum(f"{axes},bhrkv->bhrcv", k, d_state)
        d_new = d_new_local + (d_written if write is None else write[..., None] * d_written)
        before = carry[..., None] * d_state + d_state_local
        return before - einsum("bhrck,bhrcv->bhrkv", w, d_new), (d_state, d_new)

    chunks = (solved_keys, keys, write, carry, d_new_local, d_state_local)
    d_initial, (d_states, d_new_values) = jax.lax.scan(step, d_final, chunks, reverse=True)
    return d_states, d_new_values, d_initial


def _key_axes(keys: jax.Array) -> str:
    return "bhck" if keys.ndim == 5 else "bhrck"
