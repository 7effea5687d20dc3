"""Chunked delta rule whose decay is one number per head and token, or 1, with its own gradient.

Gated Delta Networks (arXiv 2412.06464) and DeltaNet (arXiv 2406.06484). For one chunk, G the
cumulative log decay, q already scaled, S the state that enters:

    D_ij = e^(G_i - G_j) for i >= j       L = strict_lower(beta_i <k_i, k_j> D_ij)
    V'   = (I + L)^-1 beta (V - e^G K S) = U - W S
    O    = e^G Q S + ((Q K^T) D) V'
    S   <- e^(G_C) S + (e^(G_C - G) K)^T V'

Documents turn e^G, e^(G_C - G), e^(G_C) and D into masked factors (`Factors`). The gradient passes
the solve by its own rule and never through the substitution: with A = (I + L)^-1 and dV' given,
dB = A^T dV' belongs to B = beta (V - e^G K S), and dL = -strict_lower(dB V'^T).

Saved for the gradient: the inputs and A. Recomputed: W, U, all states, V'.
Legend: N chunks, H key heads, R value heads per key head, C tokens of a chunk.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from effarch.kernels.delta_rule import documents, states, triangular

HIGHEST = jax.lax.Precision.HIGHEST


class Factors(NamedTuple):
    """Decay times document mask; sizes of 1 where a factor does not depend on that axis."""

    pairs: jax.Array  # [N,B,H,R,C,C]  from token j to token i, 0 above the diagonal
    read: jax.Array  # [N,B,H,R,C]    from the entering state to token i
    write: jax.Array | None  # [N,B,H,R,C]  from token j to the end of the chunk; None: all 1
    carry: jax.Array  # [N,B,H,R,1]    from the entering state to the end of the chunk


@functools.partial(jax.custom_vjp, nondiff_argnums=(7,))
def chunked(q, k, v, beta, g, initial, docs, precision):
    """Outputs [N,B,H,R,C,V] and final state [B,H,R,K,V].

    q (scaled) and k [N,B,H,C,K], v [N,B,H,R,C,V], beta and g (or None) [N,B,H,R,C], initial
    [B,H,R,K,V], docs (or None) [N,B,C] document numbers. All floats of one dtype.
    """
    return _forward(q, k, v, beta, g, initial, docs, precision)[0]


def _forward(q, k, v, beta, g, initial, docs, precision):
    factors = _factors(g, docs, k)
    key_products = jnp.einsum("nbhik,nbhjk->nbhij", k, k, precision=HIGHEST)
    inverse = triangular.inverse_unit_lower(_lower(beta, key_products, factors))
    inverse = checkpoint_name(inverse, "delta_rule_inverse")
    einsum = functools.partial(jnp.einsum, precision=precision)
    solved_keys, solved_values = _solve(inverse, k, v, beta, factors, einsum)
    entering, new, final = states.forward(
        solved_keys, solved_values, k, factors.write, factors.carry, initial, precision
    )
    attend = einsum("nbhik,nbhjk->nbhij", q, k)[:, :, :, None] * factors.pairs
    inter = einsum("nbhck,nbhrkv->nbhrcv", q, entering)
    o = factors.read[..., None] * inter + einsum("nbhrij,nbhrjv->nbhriv", attend, new)
    return (o, final), (q, k, v, beta, g, initial, docs, inverse)


def _backward(precision, saved, cotangents):
    q, k, v, beta, g, initial, docs, inverse = saved
    d_o, d_final = cotangents
    einsum = functools.partial(jnp.einsum, precision=precision)
    f = _factors(g, docs, k)
    solved_keys, solved_values = _solve(inverse, k, v, beta, f, einsum)
    s, new, _ = states.forward(solved_keys, solved_values, k, f.write, f.carry, initial, precision)
    query_products = einsum("nbhik,nbhjk->nbhij", q, k)[:, :, :, None]
    attend = query_products * f.pairs
    d_read = f.read[..., None] * d_o
    d_s, d_new, d_initial = states.backward(
        solved_keys,
        k,
        f.write,
        f.carry,
        einsum("nbhrij,nbhriv->nbhrjv", attend, d_o),
        einsum("nbhck,nbhrcv->nbhrkv", q, d_read),
        d_final,
        precision,
    )
    # The solve: V' = A B with B = beta (V - read K S).
    d_b = einsum("nbhrij,nbhriv->nbhrjv", inverse, d_new)
    d_lower = -einsum("nbhriv,nbhrjv->nbhrij", d_b, new) * _strict(k)
    key_products = einsum("nbhik,nbhjk->nbhij", k, k)[:, :, :, None] * f.pairs
    # What q, k as reader and k as writer see of the states, before the decays.
    q_sees = einsum("nbhrcv,nbhrkv->nbhrck", d_o, s)
    k_reads = -einsum("nbhrcv,nbhrkv->nbhrck", d_b, s)
    k_writes = einsum("nbhrcv,nbhrkv->nbhrck", new, d_s)
    d_attend = einsum("nbhriv,nbhrjv->nbhrij", d_o, new)

    read, read_beta = f.read[..., None], (f.read * beta)[..., None]
    d_products = states.sum_value_heads(d_attend * f.pairs)
    d_key_products = states.sum_value_heads(d_lower * beta[..., None] * f.pairs)
    written = k_writes if f.write is None else f.write[..., None] * k_writes
    d_q = einsum("nbhij,nbhjk->nbhik", d_products, k) + states.sum_value_heads(read * q_sees)
    d_k = (
        einsum("nbhij,nbhik->nbhjk", d_products, q)
        + einsum("nbhij,nbhjk->nbhik", d_key_products, k)
        + einsum("nbhij,nbhik->nbhjk", d_key_products, k)
        + states.sum_value_heads(written + read_beta * k_reads)
    )
    k_reads_dot = einsum("nbhrck,nbhck->nbhrc", k_reads, k)
    d_beta = (
        einsum("nbhrcv,nbhrcv->nbhrc", d_b, v)
        + f.read * k_reads_dot
        + einsum("nbhrij,nbhrij->nbhri", d_lower, key_products)
    )
    d_v = beta[..., None] * d_b
    d_g = None
    if g is not None:
        # The diagonal has no decay: leaving it out keeps tiny gradients of strong decays exact.
        moved = d_attend * attend * _strict(k) + d_lower * beta[..., None] * key_products
        d_read_log = f.read * (einsum("nbhrck,nbhck->nbhrc", q_sees, q) + beta * k_reads_dot)
        d_write_log = einsum("nbhrck,nbhck->nbhrc", written, k)
        d_carry_log = f.carry[..., 0] * einsum("nbhrkv,nbhrkv->nbhr", s, d_s)
        d_g = _gate_gradient(moved, d_read_log, d_write_log, d_carry_log)
    return d_q, d_k, d_v, d_beta, d_g, d_initial, None


chunked.defvjp(_forward, _backward)


def _gate_gradient(moved, d_read_log, d_write_log, d_carry_log):
    """d g from the gradients of the logarithms of all factors.

    g_t is part of a factor that ends at i >= t, or of a write factor that starts at j < t. The latter
    are summed as they are: as a total minus the rest they would drown the small ones.
    """
    ones = jnp.ones_like(moved[..., :1, :])
    rows = jnp.einsum("...ij,...j->...i", moved, ones[..., 0, :], precision=HIGHEST)
    columns = jnp.matmul(ones, moved, precision=HIGHEST)[..., 0, :]
    until_end = cumulative(rows - columns + d_read_log, reverse=True)
    strict = _strict(moved)
    from_start = jnp.einsum("...j,ij->...i", d_write_log, strict, precision=HIGHEST)
    return until_end + from_start + d_carry_log[..., None]


def cumulative(x: jax.Array, reverse: bool = False) -> jax.Array:
    """Inclusive sums along the last axis, as a product: much faster than scans for short axes."""
    lower = jnp.tril(jnp.ones((x.shape[-1],) * 2, x.dtype))
    axes = "...i,ij->...j" if reverse else "...j,ij->...i"
    return jnp.einsum(axes, x, lower, precision=HIGHEST)


def _solve(inverse, k, v, beta, factors, einsum):
    """W = A beta read K and U = A beta V; the factors scale columns of A, so heads can share K."""
    weights = inverse * beta[..., None, :]
    solved_keys = einsum("nbhrij,nbhjk->nbhrik", weights * factors.read[..., None, :], k)
    return solved_keys, einsum("nbhrij,nbhrjv->nbhriv", weights, v)


def _lower(beta, key_products, factors):
    return beta[..., None] * (key_products[:, :, :, None] * factors.pairs) * _strict(key_products)


def _strict(like: jax.Array) -> jax.Array:
    size = like.shape[-2]
    return jnp.tril(jnp.ones((size, size), like.dtype), -1)


def _factors(g, docs, k) -> Factors:
    """All decays of all chunks; masks go in before the exponential, so nothing overflows."""
    mask = _visible(docs, k)
    if g is None:
        write = None if docs is None else mask.write.astype(k.dtype)
        pairs, read, carry = (x.astype(k.dtype) for x in (mask.pairs, mask.read, mask.carry))
        return Factors(pairs, read, write, carry)
    # g = coarse + fine: sums of coarse (multiples of 1/64) are exact, so that differences of G stay
    # accurate after a decay of -1000 in the same chunk.
    coarse = jnp.round(g * 64) / 64
    coarse, fine = cumulative(coarse), cumulative(g - coarse)
    gap = (coarse[..., :, None] - coarse[..., None, :]) + (fine[..., :, None] - fine[..., None, :])
    to_end = (coarse[..., -1:] - coarse) + (fine[..., -1:] - fine)
    from_start = coarse + fine
    logs = Factors(gap, from_start, to_end, from_start[..., -1:])
    return Factors(*(jnp.exp(jnp.where(sees, x, -jnp.inf)) for sees, x in zip(mask, logs)))


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
