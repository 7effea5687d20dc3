"""Output projection and cross-entropy in plain JAX, in chunks of time, for any device.

When differentiated, each chunk's gradients are formed as soon as its logits exist, so that logits
are computed once and never kept: what the backward gets are dx (in x's dtype) and d head (float32)
for a cotangent of 1, which it multiplies. Chunks run along time and leave the batch whole, so a
sharded batch stays sharded. Without differentiation no gradient is computed.

Also the form for accelerators: Tokamax 0.0.17 (linear_softmax_cross_entropy_loss) has a kernel for TPUs
only, without soft-cap and z-loss, and gives neither the log-sum-exp nor the largest logit of a token.

Legend: C = time steps of the chunk.
"""

import functools

import jax
import jax.numpy as jnp

from effarch.kernels import platform, varying

_BUDGET = {"cpu": 2**22, "gpu": 2**27, "tpu": 2**27}
"""Floats of logits held at once, 16 or 512 MB: XLA:CPU slows down beyond its caches."""
_TOKENS = 512  # but no fewer tokens than these, for each chunk reads and writes all of d head


def linear_cross_entropy(x, head, targets, weights, *, softcap, z_loss, chunk_size):
    """See `api.linear_cross_entropy`; returns (total, ce, logsumexp, hit)."""
    B, T, _ = x.shape
    if chunk_size is None:
        most = max(1, max(_BUDGET[platform.current()] // head.shape[1], _TOKENS) // B)
        chunk_size = -(-T // -(-T // most))  # chunks of equal size, as far as they can be
    options = (softcap, z_loss, min(chunk_size, T))
    return _loss(*varying.align([x, head, targets, weights]), options)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _loss(x_BTD, head_DW, targets_BT, weights_BT, options):
    def chunk(_, x_BCD, targets_BC, weights_BC):
        _, ce_BC, lse_BC, hit_BC, _ = _logits(x_BCD, head_DW, targets_BC, options)
        return None, (ce_BC, lse_BC, hit_BC)

    _, token = _over_chunks(chunk, None, (x_BTD, targets_BT, weights_BT), options[2])
    return _total(*token[:2], weights_BT, options), *token


def _loss_fwd(x_BTD, head_DW, targets_BT, weights_BT, options):
    softcap, z_loss, chunk_size = options

    def chunk(dhead_DW, x_BCD, targets_BC, weights_BC):
        logits_BCW, ce_BC, lse_BC, hit_BC, hot_BCW = _logits(x_BCD, head_DW, targets_BC, options)
        p_BCW = jnp.exp(logits_BCW - lse_BC[..., None])
        d_BCW = p_BCW * (1 + 2 * z_loss * lse_BC)[..., None] - hot_BCW
        if softcap is not None:
            d_BCW *= 1 - jnp.square(logits_BCW / softcap)
        d_BCW = (d_BCW * weights_BC[..., None]).astype(x_BCD.dtype)
        dx_BCD = _product("bcw,dw->bcd", d_BCW, head_DW).astype(x_BCD.dtype)
        dhead_DW += _product("bcd,bcw->dw", x_BCD, d_BCW)
        return dhead_DW, (ce_BC, lse_BC, hit_BC, dx_BCD)

    start, _ = varying.align([jnp.zeros(head_DW.shape, jnp.float32), x_BTD])
    dhead_DW, (ce_BT, lse_BT, hit_BT, dx_BTD) = _over_chunks(
        chunk, start, (x_BTD, targets_BT, weights_BT), chunk_size
    )
    total = _total(ce_BT, lse_BT, weights_BT, options)
    dweights_BT = ce_BT + z_loss * jnp.square(lse_BT)
    like_head = jnp.zeros((), head_DW.dtype)
    return (total, ce_BT, lse_BT, hit_BT), (dx_BTD, dhead_DW, dweights_BT, like_head)


def _loss_bwd(options, saved, cotangents):
    del options
    dx_BTD, dhead_DW, dweights_BT, like_head = saved
    g = cotangents[0]  # those of the tokens' values are stopped by the api
    dx_BTD = (g * dx_BTD.astype(jnp.float32)).astype(dx_BTD.dtype)
    return dx_BTD, (g * dhead_DW).astype(like_head.dtype), None, g * dweights_BT


_loss.defvjp(_loss_fwd, _loss_bwd)


def _logits(x_BCD, head_DW, targets_BC, options):
    """Logits in float32, cross-entropy, log-sum-exp, hit, and whether a word is the target.

    The target is found by comparison, not by a gather: a gather from logits whose words are sharded
    would first collect them.
    """
    softcap = options[0]
    logits_BCW = _product("bcd,dw->bcw", x_BCD, head_DW)
    if softcap is not None:
        logits_BCW = softcap * jnp.tanh(logits_BCW / softcap)
    peak_BC = jnp.max(logits_BCW, axis=-1)
    total_BC = jnp.sum(jnp.exp(logits_BCW - peak_BC[..., None]), axis=-1)
    lse_BC = peak_BC + jnp.log(total_BC)
    hot_BCW = targets_BC[..., None] == jnp.arange(head_DW.shape[1])
    score_BC = jnp.sum(jnp.where(hot_BCW, logits_BCW, 0.0), axis=-1)
    hit_BC = (score_BC >= peak_BC).astype(jnp.float32)
    return logits_BCW, lse_BC - score_BC, lse_BC, hit_BC, hot_BCW


def _total(ce_BT, lse_BT, weights_BT, options):
    return jnp.sum(weights_BT * (ce_BT + options[1] * jnp.square(lse_BT)))


def _product(spec: str, x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.einsum(spec, x, y, preferred_element_type=jnp.float32)


def _over_chunks(function, carry, arrays_BT, size):
    """Runs (carry, *chunk) -> (carry, outputs) along time, a shorter chunk last; joins outputs."""
    T = arrays_BT[0].shape[1]
    num, rest = divmod(T, size)

    def step(carry, i):
        return function(
            carry, *(jax.lax.dynamic_slice_in_dim(a, i * size, size, 1) for a in arrays_BT)
        )

    if num == 1:
        carry, outs = function(carry, *(a[:, :size] for a in arrays_BT))
    else:
        carry, stacked = jax.lax.scan(step, carry, jnp.arange(num))
        outs = jax.tree.map(_unstack, stacked)
    if rest:
        carry, last = function(carry, *(a[:, num * size :] for a in arrays_BT))
        outs = jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=1), outs, last)
    return carry, outs


def _unstack(x_NBC: jax.Array) -> jax.Array:
    """[N, B, C, ...] -> [B, N * C, ...]."""
    x_BNC = jnp.swapaxes(x_NBC, 0, 1)
    return x_BNC.reshape(x_BNC.shape[0], -1, *x_BNC.shape[3:])
