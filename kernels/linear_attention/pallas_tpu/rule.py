"""Chunked linear attention as a pair of TPU kernels with one gradient."""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from effarch.kernels.chunked import tpu_channel_gates, tpu_rows
from effarch.kernels.linear_attention.pallas_tpu import backward, forward


def linear_attention(q, k, v, g=None, *, interpret=False, **options):
    """See `api.linear_attention`; `chunk_size` is rounded up to 32, 64 or 128.

    Products of bfloat16 inputs take one pass of the matrix unit; sums, decays and the state are float32.
    `interpret` runs the kernels without a TPU, step by step: for tests.
    """
    return tpu_rows.run(chunked, q, k, v, (), g, interpret=interpret, **options)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def chunked(q, k, v, g, initial, marks, plan):
    """o [B,T,HV*V] and the final state; arguments as `tpu_rows.run` gives them."""
    g = tpu_channel_gates.summed(g, q.dtype, plan)
    return tuple(forward.forward(q, k, v, g, initial, marks, plan, saves=False))


def _forward(q, k, v, g, initial, marks, plan):
    g = tpu_channel_gates.summed(g, q.dtype, plan)
    o, final, states = forward.forward(q, k, v, g, initial, marks, plan, saves=True)
    return (o, final), (q, k, v, g, marks, checkpoint_name(states, "linear_attention_states"))


def _backward(plan, saved, cotangents):
    *gradients, d_initial = backward.backward(*saved, *cotangents, plan)
    return *gradients, d_initial, jnp.zeros_like(saved[4])


chunked.defvjp(_forward, _backward)
