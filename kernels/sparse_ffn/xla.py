"""The sparse feed-forward in plain JAX: a loop over blocks of active rows, as many as there are.

A block of rows of both tables is gathered and used at once, while it is in the cache; gathering all rows
first would write them to memory and read them again. The number of turns is known at run time only, so
nothing bounds how many neurons may be active.

Legend: J = rows of a block.
"""

import jax
import jax.numpy as jnp

from effarch.kernels.sparse_ffn import api, reference

ROWS = 64  # two blocks of 64 rows of 1 to 4 thousand numbers stay in a core's cache


def sparse_ffn(gate, x, up, down):
    """See `api.sparse_ffn`."""
    up, down = api.unfolded(up), api.unfolded(down)
    is_active_F = jnp.any(gate != 0, axis=0)
    pays = api.pays(jnp.sum(is_active_F), up.shape[0])
    return jax.lax.cond(pays, _gathered, _in_order, is_active_F, gate, x, up, down)


def _in_order(is_active_F, gate, x, up, down):
    del is_active_F
    return reference.sparse_ffn(gate, x, up, down)


def _gathered(is_active_F, gate, x, up, down):
    narrow = x.dtype
    num_active = jnp.sum(is_active_F)
    index_N = positions(is_active_F)

    def block(turn, y_BD):
        first = turn * ROWS
        index_J = jax.lax.dynamic_slice_in_dim(index_N, first, ROWS)
        is_real_J = first + jnp.arange(ROWS) < num_active
        up_JP, down_JD = up[index_J].astype(narrow), down[index_J].astype(narrow)
        u_BJ = jnp.matmul(x, up_JP.T, preferred_element_type=jnp.float32)
        h_BJ = jnp.where(is_real_J, gate[:, index_J].astype(jnp.float32) * u_BJ, 0)
        return y_BD + jnp.matmul(h_BJ.astype(narrow), down_JD, preferred_element_type=jnp.float32)

    start = jnp.zeros((x.shape[0], down.shape[1]), jnp.float32)
    turns = -(-num_active // ROWS)
    return jax.lax.fori_loop(0, turns, block, start).astype(narrow)


def positions(is_active_F):
    """The numbers of active neurons in order, then zeros, in whole blocks."""
    hidden = is_active_F.shape[0]
    place_F = jnp.where(is_active_F, jnp.cumsum(is_active_F) - 1, hidden)
    empty = jnp.zeros(-(-hidden // ROWS) * ROWS, jnp.int32)
    neurons_F = jnp.arange(hidden, dtype=jnp.int32)
    return empty.at[place_F].set(neurons_F, mode="drop")
