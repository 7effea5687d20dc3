"""Chunked linear attention as GPU kernels with one gradient."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from effarch.kernels.delta_rule.pallas_gpu import rows
from effarch.kernels.linear_attention.pallas_gpu import backward, forward


def linear_attention(q, k, v, g=None, *, interpret=False, **options):
    """See `api.linear_attention`; `chunk_size` is rounded up to 16, 32 or 64.

    Products take bfloat16 operands in one pass; sums, decays and the state are float32. `interpret`
    runs the kernels without a GPU, step by step: for tests (also in float32). What is saved for the
    gradient is called "linear_attention_states" in the policies of `jax.checkpoint`; a policy that
    leaves it out has the forward kernels run again.
    """

    def additive(q, k, v, unread, g, initial, docs, plan):
        del unread
        return chunked(q, k, v, g, initial, docs, plan)

    no_strengths = jnp.zeros(v.shape[:3])  # which the rows of the delta rule have
    return rows.run(additive, q, k, v, no_strengths, g, interpret=interpret, **options)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def chunked(q, k, v, g, initial, docs, plan):
    """o [B,T,HV,V] and the final state; arguments as `rows.run` gives them."""
    return _forward(q, k, v, g, initial, docs, plan)[0]


def _forward(q, k, v, g, initial, docs, plan):
    done = forward.forward(q, k, v, _factors(v, g, docs, plan), initial, plan)
    o, final = done.pop("o"), done.pop("final")
    return (o, final), (q, k, v, g, docs, checkpoint_name(done, "linear_attention_states"))


def _backward(plan, saved, cotangents):
    q, k, v, g, docs, done = saved
    f = _factors(v, g, docs, plan)
    gradients = backward.backward(q, k, v, f, done, *cotangents, plan)
    d_docs = None if docs is None else np.zeros(docs.shape, jax.dtypes.float0)
    return *gradients, d_docs


chunked.defvjp(_forward, _backward)


def _factors(v, g, docs, plan):
    per_token = v[..., 0].swapaxes(1, 2).astype(jnp.float32)  # for its shape
    return rows.factors(g, docs, per_token, plan)
