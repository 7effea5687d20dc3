"""Spark attention: each query attends to about k keys, Spark Transformer, arXiv 2506.06644.

The first channels of queries and keys choose and weigh the keys, the others scale what is read by a
softplus: `effarch/models/layers/spark_attend.py`. Rotary positions turn each part on its own.
"""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from effarch.models.context import Context
from effarch.models.layers import executed, heads, kv_cache, linear, rotary, spark_attend


class SparkAttention(nnx.Module):
    """D*K*(2 H + 2 G) parameters; 2*S*H*K FLOPs over S tokens if all scores and values are computed,
    of which (P*n + (2 K - P)*k) * 2*H serve n visible and k chosen keys."""

    def __init__(
        self,
        width: int,
        *,
        num_heads: int = 8,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        predictor_dim: int | None = None,
        num_keys: int = 256,
        rope_theta: float = 10000.0,
        window: int | None = None,
        init_std: float = 0.02,
        dtype=jnp.float32,
        param_dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        """`predictor_dim` (P): channels of a head that choose; `num_keys` (k): how many keys, about;
        `window`: tokens a query sees, itself included. None means: num_kv_heads = num_heads,
        head_dim = width / num_heads, predictor_dim = half of head_dim, no window."""
        num_kv_heads = num_kv_heads or num_heads
        head_dim = head_dim or heads.width_of("spark_attention", width, num_heads)
        split = predictor_dim or head_dim // 2
        _check(num_heads, num_kv_heads, head_dim, split, num_keys, window)
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        self.rope_theta, self.dtype = rope_theta, dtype
        self.split, self.num_keys, self.window = split, num_keys, window
        shared = dict(init_std=init_std, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        shared |= dict(head_dim=head_dim)
        columns = ("embed", "heads")
        self.q = linear.Linear(width, num_heads * head_dim, axes=columns, **shared)
        self.k = linear.Linear(width, num_kv_heads * head_dim, axes=columns, **shared)
        self.v = linear.Linear(width, num_kv_heads * head_dim, axes=columns, **shared)
        self.out = linear.Linear(num_heads * head_dim, width, axes=columns[::-1], **shared)

    def __call__(self, x_BTD: Float[Array, "B T D"], ctx: Context, cache: dict | None = None):
        """Returns (y [B,T,D], cache, aux)."""
        positions = ctx.token_positions(x_BTD)
        q = self._turned(heads.split(self.q(x_BTD), self.num_heads, ctx), positions)
        k = self._turned(heads.split(self.k(x_BTD), self.num_kv_heads, ctx), positions)
        v = heads.split(self.v(x_BTD), self.num_kv_heads, ctx)
        options = dict(split=self.split, num_keys=self.num_keys, window=self.window)
        if cache is None:
            o, kept_BTH = spark_attend.attend_in_row(q, k, v, ctx, **options)
        else:
            positions = kv_cache.new_positions(positions, ctx.segment_ids)
            new = {"k": k, "v": v, "positions": positions}
            seen = kv_cache.joined(cache, new)
            places = (positions, seen["positions"])
            o, kept_BTH = spark_attend.spark_attend(q, seen["k"], seen["v"], *places, **options)
            cache = kv_cache.append(cache, new)
        aux = {"metric/attended_keys": _mean(kept_BTH)} if ctx.train else {}
        return self.out(heads.join(o, ctx)), cache, aux

    def _turned(self, x, positions):
        """Each part of the channels with its own rotary frequencies."""
        parts = (x[..., : self.split], x[..., self.split :])
        turned = [rotary.rotate(part, positions, theta=self.rope_theta) for part in parts]
        return jnp.concatenate(turned, axis=-1)

    def init_cache(self, batch: int, length: int) -> dict:
        """An empty cache for sequences of up to `length` tokens (a ring of `window` if set)."""
        slots = min(length, self.window) if self.window else length
        shape = (self.num_kv_heads, self.head_dim)
        return kv_cache.init(batch, slots, {"k": shape, "v": shape}, self.dtype)

    def forward_flops(self, seq_len: int) -> float:
        """All scores and values per token, causal average; projections not included."""
        return 4.0 * _visible(self.window, seq_len) * self.num_heads * self.head_dim

    def hardware_flops(self, seq_len: int) -> executed.Flops:
        """Scores and values of all keys, later ones too, the scores again backward."""
        scores = values = 2.0 * seq_len * self.num_heads * self.head_dim
        return executed.Flops(scores + values, 3 * scores + 2 * values)

    def idle_flops(self, seq_len: int) -> float:
        """Those of `forward_flops` that gate and sum values of keys that are not chosen."""
        nearest = min(self.num_keys, self.window or seq_len)
        unused = _visible(self.window, seq_len) - _visible(nearest, seq_len)
        return 2.0 * unused * self.num_heads * (2 * self.head_dim - self.split)


def _visible(window: int | None, seq_len: int) -> float:
    """Keys that a query sees, causal average; all of a row are half of it by convention."""
    if window is None or window >= seq_len:
        return seq_len / 2
    return window * (1 - (window - 1) / (2 * seq_len))


def _mean(kept_BTH) -> Array:
    """Over queries that see any key."""
    return jnp.sum(kept_BTH, dtype=jnp.float32) / jnp.maximum(jnp.sum(kept_BTH > 0), 1)


def _check(num_heads, num_kv_heads, head_dim, split, num_keys, window) -> None:
    if num_heads % num_kv_heads:
        raise ValueError(
            f"spark_attention: num_heads={num_heads} is not a multiple of num_kv_heads={num_kv_heads}."
        )
    if not 0 < split < head_dim or split % 2 or head_dim % 2:
        raise ValueError(
            f"spark_attention: predictor_dim={split} must be even and leave an even part of "
            f"head_dim={head_dim}; use about half of it."
        )
    if num_keys < 1:
        raise ValueError(f"spark_attention: num_keys={num_keys} must be at least 1.")
    if window is not None and window < 1:
        raise ValueError(
            f"spark_attention: window={window} must be at least 1, or None for no window."
        )
