"""Chunked delta rule whose decay is a number per key channel and token, with its own gradient.

Kimi Delta Attention (arXiv 2510.26692). As `scalar_gate`, but G_i is a vector over the K channels:

    P_ij = sum_d q_id k_jd e^(G_id - G_jd), i >= j      L_ij = beta_i * the same with k_i, i > j
    V'   = (I + L)^-1 beta (V - (K e^G) S)
    O    = (Q e^G) S + P V'
    S   <- e^(G_C) S + (K e^(G_C - G))^T V'

P and L are made by `channel_pairs`, which never takes the exponential of a positive number. The
gradient of the gate needs no product of its own: what flows to a read factor of channel d is
q dq + k dk of the readers, to a write factor k dk of the writer, and g gets their sums over time.

Saved for the gradient: the inputs, A = (I + L)^-1, P and L / beta. Recomputed: all else.
Legend: N chunks, H key heads, R value heads per key head, C tokens of a chunk.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from effarch.kernels.chunked import channel_decay, channel_pairs, documents, rows
from effarch.kernels.delta_rule import states, triangular

HIGHEST = jax.lax.Precision.HIGHEST


@functools.partial(jax.custom_vjp, nondiff_argnums=(7,))
def chunked(q, k, v, beta, g, initial, docs, precision):
    """Outputs [N,B,H,R,C,V] and final state [B,H,R,K,V].

    q (scaled) and k [N,B,H,C,K], v [N,B,H,R,C,V], beta [N,B,H,R,C], g [N,B,H,R,C,K], initial
    [B,H,R,K,V], docs (or None) [N,B,C] document numbers. All floats of one dtype.
    """
    return _forward(q, k, v, beta, g, initial, docs, precision)[0]


def _forward(q, k, v, beta, g, initial, docs, precision):
    q_row, k_row = q[:, :, :, None], k[:, :, :, None]
    attend, key_products = channel_pairs.products((q_row, k_row), k_row, g)
    attend += channel_pairs.diagonal(q_row, k_row)
    if docs is not None:
        pairs = documents.boundaries(docs).pairs[:, :, None, None]
        attend, key_products = (jnp.where(pairs, x, 0) for x in (attend, key_products))
    inverse = triangular.inverse_unit_lower(beta[..., None] * key_products)
    products = checkpoint_name((inverse, attend, key_products), "delta_rule_inverse")
    inverse, attend, key_products = products
    einsum = functools.partial(jnp.einsum, precision=precision)
    read, write, carry = channel_decay.factors(g, docs)
    k_written = write * k_row
    solved = _solve(inverse, read * k_row, v, beta, einsum)
    entering, new, final = states.forward(*solved, k_written, None, carry, initial, precision)
    o = einsum("nbhrck,nbhrkv->nbhrcv", read * q_row, entering)
    o += einsum("nbhrij,nbhrjv->nbhriv", attend, new)
    return (o, final), (q, k, v, beta, g, initial, docs, products)


def _backward(precision, saved, cotangents):
    q, k, v, beta, g, initial, docs, (inverse, attend, key_products) = saved
    d_o, d_final = cotangents
    einsum = functools.partial(jnp.einsum, precision=precision)
    read, write, carry = channel_decay.factors(g, docs)
    q_row, k_row = q[:, :, :, None], k[:, :, :, None]
    q_read, k_read, k_written = read * q_row, read * k_row, write * k_row
    solved = _solve(inverse, k_read, v, beta, einsum)
    s, new, _ = states.forward(*solved, k_written, None, carry, initial, precision)
    d_s, d_new, d_initial = states.backward(
        solved[0],
        k_written,
        None,
        carry,
        einsum("nbhrij,nbhriv->nbhrjv", attend, d_o),
        einsum("nbhrck,nbhrcv->nbhrkv", q_read, d_o),
        d_final,
        precision,
    )
    # The solve: V' = A B with B = beta (V - K_read S).
    d_b = einsum("nbhrij,nbhriv->nbhrjv", inverse, d_new)
    d_lower = -einsum("nbhriv,nbhrjv->nbhrij", d_b, new)
    d_attend = einsum("nbhriv,nbhrjv->nbhrij", d_o, new)
    d_k_read = -einsum("nbhrcv,nbhrkv->nbhrck", d_b, s)
    d_beta = (
        einsum("nbhrcv,nbhrcv->nbhrc", d_b, v)
        + einsum("nbhrck,nbhrck->nbhrc", d_k_read, k_read)
        + einsum("nbhrij,nbhrij->nbhri", d_lower, key_products)
    )
    d_products = (d_attend, d_lower * beta[..., None])
    if docs is not None:
        pairs = documents.boundaries(docs).pairs[:, :, None, None]
        d_products = tuple(jnp.where(pairs, x, 0) for x in d_products)
    (d_q, d_k_reader), d_k_writer = channel_pairs.products_gradient(
        d_products, (q_row, k_row), k_row, g
    )
    # The diagonal of P has no decay and joins only after the gate has been served.
    diagonal = jnp.diagonal(d_attend, axis1=-2, axis2=-1)[..., None]
    d_q += read * einsum("nbhrcv,nbhrkv->nbhrck", d_o, s)
    d_k_reader += beta[..., None] * read * d_k_read
    d_k_written = write * einsum("nbhrcv,nbhrkv->nbhrck", new, d_s)
    d_g = channel_decay.gradient(
        q_row * d_q + k_row * (d_k_reader - d_k_writer),
        k_row * d_k_written,
        carry * einsum("nbhrkv,nbhrkv->nbhrk", s, d_s),
    )
    d_q = rows.sum_value_heads(d_q + diagonal * k_row)
    d_k = d_k_reader + d_k_writer + d_k_written + diagonal * q_row
    d_k = rows.sum_value_heads(d_k)
    return d_q, d_k, beta[..., None] * d_b, d_beta, d_g, d_initial, None


chunked.defvjp(_forward, _backward)


def _solve(inverse, k_read, v, beta, einsum):
    """W = A beta K_read and U = A beta V."""
    weights = inverse * beta[..., None, :]
    solved_keys = einsum("nbhrij,nbhrjk->nbhrik", weights, k_read)
    return solved_keys, einsum("nbhrij,nbhrjv->nbhriv", weights, v)
