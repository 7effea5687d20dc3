"""The only sequential part of chunked linear attention: the state from chunk to chunk, both ways.

With S the state that enters a chunk, K the write keys, w the write factors and c the carry factor:

    forward:   S <- c S + K^T (w V)        backward:  dS <- c dS + dS_local

Legend: N chunks, B batch, H key heads, R value heads per key head, C tokens of a chunk, K and V head
widths. K is [N,B,H,C,K] where the value heads share it and [N,B,H,R,C,K] where they do not.
"""

import jax
import jax.numpy as jnp


def forward(keys, values, write, carry, initial, precision):
    """All entering states [N,B,H,R,K,V] and the final state.

    `values` [N,B,H,R,C,V], `write` [N,B,H,R,C] or None for ones, `carry` [N,B,H,R,1|K].
    """
    axes = "bhck" if keys.ndim == 5 else "bhrck"

    def step(state, chunk):
        k, v, write, carry = chunk
        written = v if write is None else write[..., None] * v
        new = jnp.einsum(f"{axes},bhrcv->bhrkv", k, written, precision=precision)
        return carry[..., None] * state + new, state

    final, states = jax.lax.scan(step, initial, (keys, values, write, carry))
    return states, final


def backward(carry, d_state_local, d_final):
    """dS at the end of every chunk [N,B,H,R,K,V] and d initial state."""

    def step(d_state, chunk):
        carry, d_state_local = chunk
        return carry[..., None] * d_state + d_state_local, d_state

    d_initial, d_states = jax.lax.scan(step, d_final, (carry, d_state_local), reverse=True)
    return d_states, d_initial
