"""Decays inside chunks where every key channel has its own: their factors and their gradient.

    read_i = e^(G_i)     write_j = e^(G_C - G_j)     carry = e^(G_C)      (vectors over the K channels)

What lies between two tokens of a chunk is the business of `channel_pairs`.
Legend: N chunks, B batch, H key heads, R value heads per key head, C tokens of a chunk.
"""

import jax
import jax.numpy as jnp

from effarch.kernels.chunked import documents

HIGHEST = jax.lax.Precision.HIGHEST


def factors(g: jax.Array, docs: jax.Array | None) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Decay times document mask: read and write [N,B,H,R,C,K], carry [N,B,H,R,K]."""
    ones = jnp.ones((g.shape[-2],) * 2, g.dtype)
    from_start, to_end = (
        jnp.einsum("ts,...sk->...tk", x, g, precision=HIGHEST)
        for x in (jnp.tril(ones), jnp.triu(ones, 1))
    )
    read, write = jnp.exp(from_start), jnp.exp(to_end)
    carry = read[..., -1, :]
    if docs is None:
        return read, write, carry
    mask = documents.boundaries(docs)
    return (
        jnp.where(mask.reads[:, :, None, None, :, None], read, 0),
        jnp.where(mask.writes[:, :, None, None, :, None], write, 0),
        jnp.where(mask.carries[:, :, None, None, None], carry, 0),
    )


def gradient(d_log: jax.Array, d_write_log: jax.Array, d_carry_log: jax.Array) -> jax.Array:
    """d g [...,C,K] from the gradients of the logarithms of all factors, as `head_decay` does it.

    `d_log` is that of the readers (q d_q, k d_k as a row) minus that of the writers (k d_k as a column).
    """
    size = d_log.shape[-2]
    upper = jnp.triu(jnp.ones((size, size), d_log.dtype))
    strict = jnp.tril(jnp.ones((size, size), d_log.dtype), -1)
    until_end = jnp.einsum("ti,...ik->...tk", upper, d_log, precision=HIGHEST)
    from_start = jnp.einsum("ti,...ik->...tk", strict, d_write_log, precision=HIGHEST)
    return until_end + from_start + d_carry_log[..., None, :]
