"""Attention sinks: tokens that draw attention and carry massive activations, arXiv 2503.03321.

    token is a sink if  max over d in D_sink of |x_d| / rms(x) > tau,   tau = 0.3125 sqrt(D)

x is what the attention reads before its norm, D_sink the channels that exceed tau at half or more of
the first tokens of documents. The paper's tau is 20 at D = 4096; |x_d| / rms(x) is at most sqrt(D), so
that ours grows with the width.
"""

from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from effarch.analysis import layers
from effarch.models import language_model
from effarch.models.context import Context
from effarch.models.mixers import attention

SHARE = 0.3125
"""tau / sqrt(D)."""


def outliers(x_BTD: Float[Array, "B T D"]) -> Bool[Array, "B T D"]:
    """Which channels of a token exceed tau."""
    x = jnp.abs(x_BTD.astype(jnp.float32))
    rms = jnp.sqrt(jnp.mean(x * x, axis=-1, keepdims=True))
    return x > SHARE * x.shape[-1] ** 0.5 * jnp.maximum(rms, 1e-30)


def sinks(x_BTD: Float[Array, "B T D"], first_BT: Bool[Array, "B T"]):
    """(which tokens are sinks [B,T], which channels are those of sinks [D])."""
    out_BTD = outliers(x_BTD)
    of_first_D = jnp.sum(out_BTD & first_BT[..., None], axis=(0, 1))
    channels_D = of_first_D >= 0.5 * jnp.maximum(jnp.sum(first_BT), 1)
    return jnp.any(out_BTD & channels_D, axis=-1), channels_D


def first_tokens(batch: dict) -> Bool[Array, "B T"]:
    """The first token of every document, and of every row."""
    segments_BT = batch["segment_ids"]
    before_BT = jnp.pad(segments_BT[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    return (segments_BT != before_BT) & (segments_BT != 0)


def share(mixer, marked_BT, x_BTD, batch: dict) -> Float[Array, " H"]:
    """What each head gives to marked tokens; mean over queries that are not first tokens."""
    ctx: Context = layers.context(batch)
    share_BTH = mixer.share_of(marked_BT, x_BTD, ctx).astype(jnp.float32)
    asks_BT = (batch["segment_ids"] != 0) & ~first_tokens(batch)
    return jnp.sum(share_BTH * asks_BT[..., None], axis=(0, 1)) / jnp.maximum(jnp.sum(asks_BT), 1)


def measure(
    model: language_model.LanguageModel, passes: Sequence[layers.Passed], batch: dict
) -> dict:
    """Of each layer with softmax attention: `first_share` and `sink_share` [layers, heads], how many
    tokens are sinks and how many channels make them. Raises ValueError if no layer has any."""
    ctx, first_BT, found = layers.context(batch), first_tokens(batch), {}
    for number, (block, passed) in enumerate(zip(layers.blocks(model), passes)):
        if isinstance(block.mixer, attention.Attention):
            read_BTD = block.mixer_residual.enter(passed.before, ctx)
            sink_BT, channels_D = sinks(passed.before, first_BT)
            found[number] = {
                "first_share": share(block.mixer, first_BT, read_BTD, batch),
                "sink_share": share(block.mixer, sink_BT, read_BTD, batch),
                "sink_tokens": jnp.mean(sink_BT & (batch["segment_ids"] != 0)),
                "sink_channels": jnp.sum(channels_D),
            }
    if not found:
        raise ValueError(
            "no layer of this model has softmax attention (`attention`), and sinks are its tokens."
        )
    return found
