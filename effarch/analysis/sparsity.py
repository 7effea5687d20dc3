"""How many neurons a feed-forward needs: Sparsing Law, arXiv 2411.02335.

    neuron i adds n_i = h_i W_down[i];   D(eps) = {i: |n_i| < eps};   active ratio = 1 - |D| / F
    CETT(eps) = mean over tokens of |sum over D of n_i| / |y|

One CETT for all layers gives each its eps; PPL-p% is the active ratio at the CETT where the perplexity
of the model, all layers pruned, is p % higher. h and y come from one pass of the whole model; the loss
from a second one, with the neurons of every layer left out. Where we differ from the authors' code: its
index of the chosen threshold wraps around if even the smallest is too large; ours stays the smallest.

Legend: N = tokens.
"""

import contextlib
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from effarch.analysis import layers
from effarch.models import language_model
from effarch.models.layers import linear

CANDIDATES = 1 << 16
_TINY = 1e-30


def down_layers(model: language_model.LanguageModel) -> list[linear.Linear | None]:
    """Of every layer the product that ends its feed-forward; None where that is no single one."""
    found = [getattr(block.ffn, "down", None) for block in layers.blocks(model)]
    return [down if isinstance(down, linear.Linear) else None for down in found]


def hidden(model: language_model.LanguageModel, batch: dict):
    """([h [N,F]], [W_down [F,D]]) of the layers that have one, float32, padding with h = 0.

    Raises ValueError if no feed-forward ends in a single product.
    """
    ctx, kept = layers.context(batch), []
    real_N = (batch["segment_ids"] != 0).reshape(-1)
    x_BTD = model.enter(batch["inputs"], ctx)
    for block in layers.blocks(model):
        down = getattr(block.ffn, "down", None)
        with contextlib.ExitStack() as stack:
            if isinstance(down, linear.Linear):
                seen: list[Array] = []
                stack.enter_context(layers.tapped(down, functools.partial(_keep, seen)))
            x_BTD = layers.through(block, x_BTD, ctx).after
        if isinstance(down, linear.Linear):
            h_NF = seen[0].reshape(real_N.size, -1).astype(jnp.float32)
            kept.append((jnp.where(real_N[:, None], h_NF, 0), down.matrix().astype(jnp.float32)))
    if not kept:
        raise ValueError(
            "no feed-forward of this model ends in one product of its neurons; sparsity is measured "
            "for glu, mlp, sparse_glu, spark_ffn, q_sparse and structured_mlp."
        )
    return tuple(zip(*kept))


def _keep(seen: list, x: Array) -> Array:
    seen.append(x)
    return x


def sizes(h_NF: Float[Array, "N F"], w_FD: Float[Array, "F D"]) -> Float[Array, "N F"]:
    """|n_i| of every token and neuron."""
    return jnp.abs(h_NF) * jnp.linalg.norm(w_FD, axis=1)


def cett(h_NF: Float[Array, "N F"], w_FD: Float[Array, "F D"], eps) -> Float[Array, ""]:
    """The relative error of leaving out neurons below eps; mean over tokens with an output."""
    return _cett(h_NF, w_FD, jnp.linalg.norm(h_NF @ w_FD, axis=1), eps)


def _cett(h_NF, w_FD, y_N, eps):
    left_out = jnp.where(sizes(h_NF, w_FD) < eps, h_NF, 0)
    error_N = jnp.linalg.norm(left_out @ w_FD, axis=1) / jnp.maximum(y_N, _TINY)
    return jnp.sum(jnp.where(y_N > 0, error_N, 0)) / jnp.maximum(jnp.sum(y_N > 0), 1)


def threshold(h_NF: Float[Array, "N F"], w_FD: Float[Array, "F D"], target) -> Float[Array, ""]:
    """The largest of `CANDIDATES` values of eps, from the least |n_i| to their 0.99 quantile, whose
    CETT is at most the target."""
    n_NF = sizes(h_NF, w_FD)
    y_N = jnp.linalg.norm(h_NF @ w_FD, axis=1)
    least, most = jnp.min(n_NF), jnp.quantile(n_NF, 0.99)
    value = lambda index: least + (most - least) * index / (CANDIDATES - 1)  # noqa: E731

    def halve(_, bounds):
        low, high = bounds
        middle = (low + high) // 2
        is_over = _cett(h_NF, w_FD, y_N, value(middle)) > target
        is_open = low < high
        return jnp.where(is_open & ~is_over, middle + 1, low), jnp.where(
            is_open & is_over, middle, high
        )

    low, _ = jax.lax.fori_loop(0, 17, halve, (jnp.int32(0), jnp.int32(CANDIDATES - 1)))
    return value(jnp.maximum(low - 1, 0))


def active_ratio(h_NF, w_FD, eps, real_N) -> Float[Array, ""]:
    """The share of neurons at or above eps, over real tokens."""
    active = (sizes(h_NF, w_FD) >= eps) & (h_NF != 0)
    return jnp.sum(active * real_N[:, None]) / (jnp.sum(real_N) * h_NF.shape[1])


def pruned_loss(model: language_model.LanguageModel, batch: dict, eps: list) -> Float[Array, ""]:
    """Mean loss of the scored tokens, nats, neurons below each layer's eps left out."""
    ctx, rest = layers.context(batch), iter(eps)
    x_BTD = model.enter(batch["inputs"], ctx)
    for block in layers.blocks(model):
        down = getattr(block.ffn, "down", None)
        with contextlib.ExitStack() as stack:
            if isinstance(down, linear.Linear):
                scale_F = jnp.linalg.norm(down.matrix().astype(jnp.float32), axis=1)
                prune = functools.partial(_prune, scale_F, next(rest))
                stack.enter_context(layers.tapped(down, prune))
            x_BTD = layers.through(block, x_BTD, ctx).after
    scores = jax.nn.log_softmax(model.logits(model.leave(x_BTD)))
    picked = jnp.take_along_axis(scores, batch["targets"][..., None], axis=-1)[..., 0]
    weights = batch["loss_weights"]
    return -jnp.sum(picked * weights) / jnp.sum(weights)


def _prune(scale_F, eps, h_BTF):
    return jnp.where(jnp.abs(h_BTF.astype(jnp.float32)) * scale_F < eps, 0, h_BTF)


def at_cett(model: language_model.LanguageModel, batch: dict, hs, ws, target):
    """(loss, [active ratio of each layer]) where every layer's CETT is at most `target`.

    `hs`, `ws`: what `hidden` returns.
    """
    real_N = (batch["segment_ids"] != 0).reshape(-1)
    eps = [threshold(h, w, target) for h, w in zip(hs, ws)]
    ratios = [active_ratio(h, w, e, real_N) for h, w, e in zip(hs, ws, eps)]
    return pruned_loss(model, batch, eps), jnp.stack(ratios)


def search(measure: Callable[[float], tuple], percent: float, *, steps: int = 20) -> dict:
    """PPL-p%: bisection of CETT from 0 to 1 to the largest whose loss is below ln(1 + p/100) more.

    `measure(target)` is `at_cett` of a model; that of a negative target prunes nothing.
    """
    dense, exact = measure(-1.0)
    low, high, best = 0.0, 1.0, (dense, exact)
    for _ in range(steps):
        middle = (low + high) / 2
        loss, ratios = measure(middle)
        if loss - dense < jnp.log1p(percent / 100):
            low, best = middle, (loss, ratios)
        else:
            high = middle
    return {
        "cett": low,
        "loss": float(dense),
        "pruned_loss": float(best[0]),
        "ppl_ratio": float(jnp.exp(best[0] - dense)),
        "nonzero_ratio": [float(x) for x in exact],
        "active_ratio": [float(x) for x in best[1]],
    }


def measure(model: language_model.LanguageModel, batch: dict, *, percent: float = 1.0) -> dict:
    """PPL-p% of a model on a batch; `nonzero_ratio` is that of neurons that are not 0."""
    graphdef, state = nnx.split(model)
    found = _hidden(graphdef, state, batch)
    at = lambda target: jax.device_get(_at_cett(graphdef, state, batch, found, target))  # noqa: E731
    return search(at, percent)


@functools.partial(jax.jit, static_argnums=0)
def _hidden(graphdef, state, batch):
    return hidden(nnx.merge(graphdef, state), batch)


@functools.partial(jax.jit, static_argnums=0)
def _at_cett(graphdef, state, batch, found, target):
    return at_cett(nnx.merge(graphdef, state), batch, *found, target)
