"""Chunked delta rule whose decay is one number per head and token, or 1, with its own gradient.

Gated Delta Networks (arXiv 2412.06464) and DeltaNet (arXiv 2406.06484). For one chunk, G the
cumulative log decay, q already scaled, S the state that enters:

    D_ij = e^(G_i - G_j) for i >= j       L = strict_lower(beta_i <k_i, k_j> D_ij)
    V'   = (I + L)^-1 beta (V - e^G K S) = U - W S
    O    = e^G Q S + ((Q K^T) D) V'
    S   <- e^(G_C) S + (e^(G_C - G) K)^T V'

Documents turn e^G, e^(G_C - G), e^(G_C) and D into masked factors (`head_decay.Factors`). The
gradient passes the solve by its own rule and never through the substitution: with A = (I + L)^-1 and
dV' given, dB = A^T dV' belongs to B = beta (V - e^G K S), and dL = -strict_lower(dB V'^T).

Saved for the gradient: the inputs and A. Recomputed: W, U, all states, V'.
Legend: N chunks, H key heads, R value heads per key head, C tokens of a chunk.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from effarch.kernels.chunked import head_decay, rows
from effarch.kernels.delta_rule import states, triangular

HIGHEST = jax.lax.Precision.HIGHEST


@functools.partial(jax.custom_vjp, nondiff_argnums=(7,))
def chunked(q, k, v, beta, g, initial, docs, precision):
    """Outputs [N,B,H,R,C,V] and final state [B,H,R,K,V].

    q (scaled) and k [N,B,H,C,K], v [N,B,H,R,C,V], beta and g (or None) [N,B,H,R,C], initial
    [B,H,R,K,V], docs (or None) [N,B,C] document numbers. All floats of one dtype.
    """
    return _forward(q, k, v, beta, g, initial, docs, precision)[0]


def _forward(q, k, v, beta, g, initial, docs, precision):
    factors = head_decay.factors(g, docs, k)
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
    f = head_decay.factors(g, docs, k)
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
    d_lower = -einsum("nbhriv,nbhrjv->nbhrij", d_b, new) * head_decay.strictly_lower(k)
    key_products = einsum("nbhik,nbhjk->nbhij", k, k)[:, :, :, None] * f.pairs
    # What q, k as reader and k as writer see of the states, before the decays.
    q_sees = einsum("nbhrcv,nbhrkv->nbhrck", d_o, s)
    k_reads = -einsum("nbhrcv,nbhrkv->nbhrck", d_b, s)
    k_writes = einsum("nbhrcv,nbhrkv->nbhrck", new, d_s)
    d_attend = einsum("nbhriv,nbhrjv->nbhrij", d_o, new)

    read, read_beta = f.read[..., None], (f.read * beta)[..., None]
    d_products = rows.sum_value_heads(d_attend * f.pairs)
    d_key_products = rows.sum_value_heads(d_lower * beta[..., None] * f.pairs)
    written = k_writes if f.write is None else f.write[..., None] * k_writes
    d_q = einsum("nbhij,nbhjk->nbhik", d_products, k) + rows.sum_value_heads(read * q_sees)
    d_k = (
        einsum("nbhij,nbhik->nbhjk", d_products, q)
        + einsum("nbhij,nbhjk->nbhik", d_key_products, k)
        + einsum("nbhij,nbhik->nbhjk", d_key_products, k)
        + rows.sum_value_heads(written + read_beta * k_reads)
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
        moved = (
            d_attend * attend * head_decay.strictly_lower(k)
            + d_lower * beta[..., None] * key_products
        )
        d_read_log = f.read * (einsum("nbhrck,nbhck->nbhrc", q_sees, q) + beta * k_reads_dot)
        d_write_log = einsum("nbhrck,nbhck->nbhrc", written, k)
        d_carry_log = f.carry[..., 0] * einsum("nbhrkv,nbhrkv->nbhr", s, d_s)
        d_g = head_decay.gradient(moved, d_read_log, d_write_log, d_carry_log)
    return d_q, d_k, d_v, d_beta, d_g, d_initial, None


chunked.defvjp(_forward, _backward)


def _solve(inverse, k, v, beta, factors, einsum):
    """W = A beta read K and U = A beta V; the factors scale columns of A, so heads can share K."""
    weights = inverse * beta[..., None, :]
    solved_keys = einsum("nbhrij,nbhjk->nbhrik", weights * factors.read[..., None, :], k)
    return solved_keys, einsum("nbhrij,nbhrjv->nbhriv", weights, v)


def _lower(beta, key_products, factors):
    return (
        beta[..., None]
        * (key_products[:, :, :, None] * factors.pairs)
        * head_decay.strictly_lower(key_products)
    )
