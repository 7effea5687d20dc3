"""The chunked delta rule as a pair of TPU kernels with one gradient."""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from effarch.kernels.chunked import tpu_channel_gates, tpu_rows
from effarch.kernels.delta_rule.pallas_tpu import (
    backward,
    channel_backward,
    forward,
)

_SMALLEST_BETA = 2.0**-80


def gated_delta_rule(q, k, v, beta, g=None, *, interpret=False, precise=False, **options):
    """See `api.gated_delta_rule`; `chunk_size` is rounded up to 32, 64 or 128.

    Products of bfloat16 inputs take one pass of the matrix unit; sums, decays and the state are float32.
    `precise` (the backend "pallas_tpu_precise"): the forward's factors keep 16 bits; the backward is the
    same. On v6e the forward then takes 3.4 instead of 2.3 bundles a token and head, that of decays per
    channel 4.9 instead of 3.7. `interpret` runs the kernels without a TPU, step by step: for tests. What
    is saved for the gradient is called "delta_rule_states" in the policies of `jax.checkpoint`; a policy
    that leaves it out has the forward kernel run again.
    """
    options |= dict(interpret=interpret, precise=precise)
    return tpu_rows.run(chunked, q, k, v, (beta,), g, **options)


@functools.partial(jax.custom_vjp, nondiff_argnums=(7,))
def chunked(q, k, v, beta, g, initial, marks, plan):
    """o [B,T,HV*V] and the final state; arguments as `tpu_rows.run` gives them."""
    beta, g = _safe(beta), tpu_channel_gates.summed(g, q.dtype, plan)
    return tuple(forward.forward(q, k, v, beta, g, initial, marks, plan, saves=False))


def _forward(q, k, v, beta, g, initial, marks, plan):
    beta, g = _safe(beta), tpu_channel_gates.summed(g, q.dtype, plan)
    o, final, *saved = forward.forward(q, k, v, beta, g, initial, marks, plan, saves=True)
    return (o, final), (q, k, beta, g, marks, *checkpoint_name(saved, "delta_rule_states"))


def _backward(plan, saved, cotangents):
    kernel = channel_backward if plan.per_channel else backward
    d_q, d_k, d_v, beta_d_beta, d_g, d_initial = kernel.backward(*saved, *cotangents, plan)
    beta, marks = saved[2], saved[4]
    return d_q, d_k, d_v, beta_d_beta / beta, d_g, d_initial, jnp.zeros_like(marks)


chunked.defvjp(_forward, _backward)


def _safe(beta):
    """The gradient divides by beta: a beta of 0 counts as one that changes no digit."""
    return jnp.where(jnp.abs(beta) < _SMALLEST_BETA, _SMALLEST_BETA, beta)
