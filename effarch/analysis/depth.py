"""How a model uses its depth: Do Language Models Use Their Depth Efficiently?, arXiv 2505.13898.

    contribution of layer l   |h_{l+1} - h_l| / |h_l|, and of its mixer and ffn by themselves
    skipping layer s          E[s, l] = max over tokens of |d_l - d'_l| / |d_l|, d_l what layer l adds
    logit lens                KL(p_l || p_out) and common top-5 words, p_l = head(norm(h_{l+1}))

A skipped layer is the identity at positions 1 .. t - 1, never at position 0, and what changes is looked
at from t on (`future`) or everywhere (`all`). `passes` are what `layers.passes` returns.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from effarch.analysis import layers
from effarch.models import language_model

_SMALL = 1e-6


def contributions(passes: Sequence[layers.Passed], batch: dict) -> dict[str, Array]:
    """Means over tokens, each [Y]: norm ratios and cosines of what is added to the stream."""
    real_BT = batch["segment_ids"] != 0
    found: dict[str, list] = {}
    for passed in passes:
        before, between, after = (
            x.astype(jnp.float32) for x in (passed.before, passed.between, passed.after)
        )
        for name, added, onto in (
            ("mixer", between - before, before),
            ("ffn", after - between, between),
            ("layer", after - before, before),
        ):
            ratio_BT = _norm(added) / jnp.maximum(_norm(onto), _SMALL)
            cosine_BT = jnp.sum(added * onto, axis=-1) / jnp.maximum(
                _norm(added) * _norm(onto), _SMALL
            )
            found.setdefault(name, []).append(_mean(ratio_BT, real_BT))
            found.setdefault(f"{name}_cosine", []).append(_mean(cosine_BT, real_BT))
    return {name: jnp.stack(values) for name, values in found.items()}


def effective_depth(contribution: Float[Array, " Y"], share: float = 0.8) -> int:
    """The least number of first layers whose contributions make up this share of all."""
    total = jnp.cumsum(jnp.asarray(contribution, jnp.float32))
    return int(jnp.argmax(total >= share * total[-1] - 1e-7)) + 1


def skip_effects(
    model: language_model.LanguageModel,
    passes: Sequence[layers.Passed],
    batch: dict,
    skipped,
    until,
) -> dict:
    """What layer `skipped` does to later layers and to the output; both numbers may be traced.

    It is the identity at positions 1 .. until - 1. Returns E of every layer, [Y], and the largest change
    of the next word's probabilities, both at all positions and at positions from `until` on.
    """
    ctx = layers.context(batch)
    place_T = jnp.arange(batch["inputs"].shape[1])
    skip_T1 = ((place_T > 0) & (place_T < until))[:, None]
    real_BT = batch["segment_ids"] != 0
    x_BTD = passes[0].before
    seen = {"all": real_BT, "future": real_BT & (place_T >= until)}
    effects: dict[str, list] = {"all": [], "future": []}
    for number, (block, passed) in enumerate(zip(layers.blocks(model), passes)):
        changed_BTD = layers.through(block, x_BTD, ctx).after
        changed_BTD = jnp.where((number == skipped) & skip_T1, x_BTD, changed_BTD)
        was_BTD, is_BTD = passed.after - passed.before, changed_BTD - x_BTD
        error_BT = _norm(was_BTD - is_BTD) / jnp.maximum(_norm(was_BTD), _SMALL)
        for name, mask_BT in seen.items():
            effects[name].append(jnp.max(jnp.where(mask_BT & (number > skipped), error_BT, 0)))
        x_BTD = changed_BTD
    ends = (passes[-1].after, x_BTD)
    was, now = (jax.nn.softmax(model.logits(model.leave(x))) for x in ends)
    moved_BT = _norm(was - now)
    found = {name: jnp.stack(values) for name, values in effects.items()}
    return found | {
        f"{name}_output": jnp.max(jnp.where(mask, moved_BT, 0)) for name, mask in seen.items()
    }


def logit_lens(
    model: language_model.LanguageModel, passes: Sequence[layers.Passed], batch: dict
) -> dict[str, Array]:
    """`kl` in nats and `top5`, the share of common words among the best five, [Y], means over tokens."""
    real_BT = batch["segment_ids"] != 0
    scores = [jax.nn.log_softmax(model.logits(model.leave(passed.after))) for passed in passes]
    best = [jax.lax.top_k(score, 5)[1] for score in scores]
    kl, top5 = [], []
    for score, words in zip(scores, best):
        kl.append(_mean(jnp.sum(jnp.exp(score) * (score - scores[-1]), axis=-1), real_BT))
        common_BT5 = jnp.any(words[..., :, None] == best[-1][..., None, :], axis=-1)
        top5.append(_mean(jnp.mean(common_BT5, axis=-1), real_BT))
    return {"kl": jnp.stack(kl), "top5": jnp.stack(top5)}


def _norm(x: Array) -> Array:
    return jnp.linalg.norm(x.astype(jnp.float32), axis=-1)


def _mean(values_BT: Array, real_BT: Array) -> Array:
    return jnp.sum(jnp.where(real_BT, values_BT, 0)) / jnp.maximum(jnp.sum(real_BT), 1)
