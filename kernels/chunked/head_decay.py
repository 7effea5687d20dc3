"""Decays inside chunks where all channels of a head share one: their factors and their gradient.

With G the cumulative log decay of a chunk of C tokens:

    pairs_ij = e^(G_i - G_j), i >= j     read_i = e^(G_i)     write_j = e^(G_C - G_j)     carry = e^(G_C)

Documents turn each of them to 0 where it would cross a boundary.
Legend: N chunks, B batch, H key heads, R value heads per key head, C tokens of a chunk.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from effarch.kernels.chunked import documents

HIGHEST = jax.lax.Precision.HIGHEST


class Factors(NamedTuple):
    """Decay times document mask; sizes of 1 where a factor does not depend on that axis."""

    pairs: jax.Array  # [N,B,H,R,C,C]  from token j to token i, 0 above the diagonal
    read: jax.Array  # [N,B,H,R,C]    from the entering state to token i
    write: jax.Array | None  # [N,B,H,R,C]  from token j to the end of the chunk; None: all 1
    carry: jax.Array  # [N,B,H,R,1]    from the entering state to the end of the chunk


def factors(g: jax.Array | None, docs: jax.Array | None, k: jax.Array) -> Factors:
    """All decays of all chunks; masks go in before the exponential, so nothing overflows.

    g [N,B,H,R,C] or None (no decay), docs [N,B,C] or None; k [N,B,H,C,K] gives sizes and dtype.
    """
    mask = _visible(docs, k)
    if g is None:
        write = None if docs is None else mask.write.astype(k.dtype)
        pairs, read, carry = (x.astype(k.dtype) for x in (mask.pairs, mask.read, mask.carry))
        return Factors(pairs, read, write, carry)
    # g = coarse + fine: sums of coarse (multiples of 1/64) are exact, so that differences of G stay
    # accurate after a decay of -1000 in the same chunk.
    coarse = jnp.round(g * 64) / 64
    coarse, fine = _cumulative(coarse), _cumulative(g - coarse)
    gap = (coarse[..., :, None] - coarse[..., None, :]) + (fine[..., :, None] - fine[..., None, :])
    to_end = (coarse[..., -1:] - coarse) + (fine[..., -1:] - fine)
    from_start = coarse + fine
    logs = Factors(gap, from_start, to_end, from_start[..., -1:])
    return Factors(*(jnp.exp(jnp.where(sees, x, -jnp.inf)) for sees, x in zip(mask, logs)))


def gradient(
    d_pairs_log: jax.Array, d_read_log: jax.Array, d_write_log: jax.Array, d_carry_log: jax.Array
) -> jax.Array:
    """d g from the gradients of the logarithms of all factors (of `pairs`: below the diagonal).

    g_t is part of a factor that ends at i >= t, or of a write factor that starts at j < t. The latter
    are summed as they are: as a total minus the rest they would drown the small ones.
    """
    ones = jnp.ones_like(d_pairs_log[..., :1, :])
    rows = jnp.einsum("...ij,...j->...i", d_pairs_log, ones[..., 0, :], precision=HIGHEST)
    columns = jnp.matmul(ones, d_pairs_log, precision=HIGHEST)[..., 0, :]
    until_end = _cumulative(rows - columns + d_read_log, reverse=True)
    strict = strictly_lower(d_pairs_log)
    from_start = jnp.einsum("...j,ij->...i", d_write_log, strict, precision=HIGHEST)
    return until_end + from_start + d_carry_log[..., None]


def strictly_lower(like: jax.Array) -> jax.Array:
    """Ones below the diagonal, [C,C]; C is the axis before the last of `like`."""
    size = like.shape[-2]
    return jnp.tril(jnp.ones((size, size), like.dtype), -1)


def _cumulative(x: jax.Array, reverse: bool = False) -> jax.Array:
    """Inclusive sums along the last axis, as a product: much faster than scans for short axes."""
    lower = jnp.tril(jnp.ones((x.shape[-1],) * 2, x.dtype))
    axes = "...i,ij->...j" if reverse else "...j,ij->...i"
    return jnp.einsum(axes, x, lower, precision=HIGHEST)


def _visible(docs, k) -> Factors:
    """The factors without their decays, as booleans."""
    is_lower = jnp.tril(jnp.ones((k.shape[-2],) * 2, bool))
    if docs is None:
        always = jnp.ones((k.shape[0], 1, 1, 1, 1), bool)
        return Factors(is_lower[None, None, None, None], always, always, always)
    mask = documents.boundaries(docs)
    heads = (slice(None), slice(None), None, None)
    pairs = (mask.pairs & is_lower)[heads]
    return Factors(pairs, mask.reads[heads], mask.writes[heads], mask.carries[heads][..., None])
