"""The chunked delta rule as GPU kernels with one gradient."""

import functools

import jax
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from effarch.kernels.delta_rule.pallas_gpu import backward, forward, rows


def gated_delta_rule(q, k, v, beta, g=None, *, interpret=False, **options):
    """See `api.gated_delta_rule`; `chunk_size` is rounded up to 16, 32 or 64.

    Products take bfloat16 operands in one pass; sums, decays and the state are float32. `interpret`
    runs the kernels without a GPU, step by step: for tests (also in float32). What is saved for the
    gradient is called "delta_rule_states" in the policies of `jax.checkpoint`; a policy that leaves it
    out has the forward kernels run again.
    """
    return rows.run(chunked, q, k, v, beta, g, interpret=interpret, **options)


@functools.partial(jax.custom_vjp, nondiff_argnums=(7,))
def chunked(q, k, v, beta, g, initial, docs, plan):
    """o [B,T,HV,V] and the final state; arguments as `rows.run` gives them."""
    return _forward(q, k, v, beta, g, initial, docs, plan)[0]


def _forward(q, k, v, beta, g, initial, docs, plan):
    f = rows.factors(g, docs, beta, plan)
    done = forward.forward(q, k, v, beta, f, initial, plan)
    o, final = done.pop("o"), done.pop("final")
    return (o, final), (q, k, v, beta, g, docs, checkpoint_name(done, "delta_rule_states"))


def _backward(plan, saved, cotangents):
    q, k, v, beta, g, docs, done = saved
    f = rows.factors(g, docs, beta, plan)
    gradients = backward.backward(q, k, v, beta, f, done, *cotangents, plan)
    d_docs = None if docs is None else np.zeros(docs.shape, jax.dtypes.float0)
    return *gradients, d_docs


chunked.defvjp(_forward, _backward)
