"""Output projection and cross-entropy as defined: all logits at once, plain autodiff."""

import jax
import jax.numpy as jnp


def linear_cross_entropy(x, head, targets, weights, *, softcap, z_loss, chunk_size):
    """See `api.linear_cross_entropy`; returns (total, ce, logsumexp, hit). Ignores `chunk_size`."""
    del chunk_size
    logits_BTW = jnp.einsum("btd,dw->btw", x, head, preferred_element_type=jnp.float32)
    if softcap is not None:
        logits_BTW = softcap * jnp.tanh(logits_BTW / softcap)
    lse_BT = jax.nn.logsumexp(logits_BTW, axis=-1)
    hot_BTW = jax.nn.one_hot(targets, head.shape[1], dtype=jnp.float32)
    score_BT = jnp.sum(logits_BTW * hot_BTW, axis=-1)
    ce_BT = lse_BT - score_BT
    hit_BT = (score_BT >= jnp.max(logits_BTW, axis=-1)).astype(jnp.float32)
    return jnp.sum(weights * (ce_BT + z_loss * jnp.square(lse_BT))), ce_BT, lse_BT, hit_BT
