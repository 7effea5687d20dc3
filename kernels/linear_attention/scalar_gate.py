"""Chunked linear attention whose decay is one number per head and token, or 1, with its own gradient.

RetNet (arXiv 2307.08621, chunkwise form), Mamba-2 (arXiv 2405.21060, SSD). For one chunk, G the
cumulative log decay, q already scaled, S the state that enters, D_ij = e^(G_i - G_j) for i >= j:

    O = e^G Q S + ((Q K^T) D) V          S <- e^(G_C) S + (e^(G_C - G) K)^T V

Documents turn the exponentials into masked factors (`head_decay.Factors`).
Saved for the gradient: the inputs. Recomputed: all else.
Legend: N chunks, H key heads, R value heads per key head, C tokens of a chunk.
"""

import functools

import jax
import jax.numpy as jnp

from effarch.kernels.chunked import head_decay, rows
from effarch.kernels.linear_attention import states


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def chunked(q, k, v, g, initial, docs, precision):
    """Outputs [N,B,H,R,C,V] and final state [B,H,R,K,V].

    q (scaled) and k [N,B,H,C,K], v [N,B,H,R,C,V], g (or None) [N,B,H,R,C], initial [B,H,R,K,V],
    docs (or None) [N,B,C] document numbers. All floats of one dtype.
    """
    return _forward(q, k, v, g, initial, docs, precision)[0]


def _forward(q, k, v, g, initial, docs, precision):
    einsum = functools.partial(jnp.einsum, precision=precision)
    f = head_decay.factors(g, docs, k)
    entering, final = states.forward(k, v, f.write, f.carry, initial, precision)
    attend = einsum("nbhik,nbhjk->nbhij", q, k)[:, :, :, None] * f.pairs
    o = f.read[..., None] * einsum("nbhck,nbhrkv->nbhrcv", q, entering)
    o += einsum("nbhrij,nbhrjv->nbhriv", attend, v)
    return (o, final), (q, k, v, g, initial, docs)


def _backward(precision, saved, cotangents):
    q, k, v, g, initial, docs = saved
    d_o, d_final = cotangents
    einsum = functools.partial(jnp.einsum, precision=precision)
    f = head_decay.factors(g, docs, k)
    s, _ = states.forward(k, v, f.write, f.carry, initial, precision)
    d_s_local = einsum("nbhck,nbhrcv->nbhrkv", q, f.read[..., None] * d_o)
    d_s, d_initial = states.backward(f.carry, d_s_local, d_final)
    attend = einsum("nbhik,nbhjk->nbhij", q, k)[:, :, :, None] * f.pairs
    d_attend = einsum("nbhriv,nbhrjv->nbhrij", d_o, v)
    # What q sees of the entering state and k writes to the leaving one.
    q_sees = f.read[..., None] * einsum("nbhrcv,nbhrkv->nbhrck", d_o, s)
    k_writes, v_writes = (
        einsum("nbhrcv,nbhrkv->nbhrck", v, d_s),
        einsum("nbhck,nbhrkv->nbhrcv", k, d_s),
    )
    if f.write is not None:
        k_writes, v_writes = (f.write[..., None] * x for x in (k_writes, v_writes))
    d_products = rows.sum_value_heads(d_attend * f.pairs)
    d_q = einsum("nbhij,nbhjk->nbhik", d_products, k) + rows.sum_value_heads(q_sees)
    d_k = einsum("nbhij,nbhik->nbhjk", d_products, q) + rows.sum_value_heads(k_writes)
    d_v = einsum("nbhrij,nbhriv->nbhrjv", attend, d_o) + v_writes
    d_g = None
    if g is not None:
        # The diagonal has no decay: leaving it out keeps tiny gradients of strong decays exact.
        d_g = head_decay.gradient(
            d_attend * attend * head_decay.strictly_lower(k),
            einsum("nbhrck,nbhck->nbhrc", q_sees, q),
            einsum("nbhrck,nbhck->nbhrc", k_writes, k),
            f.carry[..., 0] * einsum("nbhrkv,nbhrkv->nbhr", s, d_s),
        )
    return d_q, d_k, d_v, d_g, d_initial, None


chunked.defvjp(_forward, _backward)
