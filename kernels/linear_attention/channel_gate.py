"""Chunked linear attention whose decay is a number per key channel and token, with its own gradient.

GLA (arXiv 2312.06635, chunkwise form with secondary chunking) and HGRN2 (arXiv 2404.07904). As
`scalar_gate`, but G_i is a vector over the K channels:

    P_ij = sum_d q_id k_jd e^(G_id - G_jd), i >= j
    O    = (Q e^G) S + P V          S <- diag(e^(G_C)) S + (K e^(G_C - G))^T V

P is made by `channel_pairs`, which never takes the exponential of a positive number. The gradient of
the gate needs no product of its own: what flows to a read factor of channel d is q dq, to a write
factor k dk, and g gets their sums over time.

Saved for the gradient: the inputs and P. Recomputed: all else.
Legend: N chunks, H key heads, R value heads per key head, C tokens of a chunk.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from effarch.kernels.chunked import channel_decay, channel_pairs, documents, rows
from effarch.kernels.linear_attention import states


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def chunked(q, k, v, g, initial, docs, precision):
    """Outputs [N,B,H,R,C,V] and final state [B,H,R,K,V].

    q (scaled) and k [N,B,H,C,K], v [N,B,H,R,C,V], g [N,B,H,R,C,K], initial [B,H,R,K,V],
    docs (or None) [N,B,C] document numbers. All floats of one dtype.
    """
    return _forward(q, k, v, g, initial, docs, precision)[0]


def _forward(q, k, v, g, initial, docs, precision):
    einsum = functools.partial(jnp.einsum, precision=precision)
    q_row, k_row = q[:, :, :, None], k[:, :, :, None]
    read, write, carry = channel_decay.factors(g, docs)
    (attend,) = channel_pairs.products((q_row,), k_row, g)
    attend = _of_one_document(attend + channel_pairs.diagonal(q_row, k_row), docs)
    attend = checkpoint_name(attend, "linear_attention_products")
    entering, final = states.forward(write * k_row, v, None, carry, initial, precision)
    o = einsum("nbhrck,nbhrkv->nbhrcv", read * q_row, entering)
    o += einsum("nbhrij,nbhrjv->nbhriv", attend, v)
    return (o, final), (q, k, v, g, initial, docs, attend)


def _backward(precision, saved, cotangents):
    q, k, v, g, initial, docs, attend = saved
    d_o, d_final = cotangents
    einsum = functools.partial(jnp.einsum, precision=precision)
    q_row, k_row = q[:, :, :, None], k[:, :, :, None]
    read, write, carry = channel_decay.factors(g, docs)
    k_written = write * k_row
    s, _ = states.forward(k_written, v, None, carry, initial, precision)
    d_s_local = einsum("nbhrck,nbhrcv->nbhrkv", read * q_row, d_o)
    d_s, d_initial = states.backward(carry, d_s_local, d_final)
    d_v = einsum("nbhrij,nbhriv->nbhrjv", attend, d_o)
    d_v += einsum("nbhrck,nbhrkv->nbhrcv", k_written, d_s)
    d_attend = _of_one_document(einsum("nbhriv,nbhrjv->nbhrij", d_o, v), docs)
    (d_q,), d_k = channel_pairs.products_gradient((d_attend,), (q_row,), k_row, g)
    d_q += read * einsum("nbhrcv,nbhrkv->nbhrck", d_o, s)
    d_k_written = write * einsum("nbhrcv,nbhrkv->nbhrck", v, d_s)
    d_g = channel_decay.gradient(
        q_row * d_q - k_row * d_k,
        k_row * d_k_written,
        carry * einsum("nbhrkv,nbhrkv->nbhrk", s, d_s),
    )
    # The diagonal of P has no decay and joins only after the gate has been served.
    diagonal = jnp.diagonal(d_attend, axis1=-2, axis2=-1)[..., None]
    d_q = rows.sum_value_heads(d_q + diagonal * k_row)
    d_k = rows.sum_value_heads(d_k + d_k_written + diagonal * q_row)
    return d_q, d_k, d_v, d_g, d_initial, None


chunked.defvjp(_forward, _backward)


def _of_one_document(pairs, docs):
    if docs is None:
        return pairs
    return jnp.where(documents.boundaries(docs).pairs[:, :, None, None], pairs, 0)
