"""Linear attention: Transformers are RNNs, arXiv 2006.16236; feature maps in `layers/feature_maps`.

    S_t = S_{t-1} + phi(k_t) v_t^T,   o_t = S_t^T phi(q_t) / sqrt(features),   y = RMSNorm(o) W_out
    normalised: o_t / (z_t^T phi(q_t) / sqrt(features) + 1e-10), z_t = z_{t-1} + phi(k_t)

z is computed as one more column of S, that of a value that is always 1.
"""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from effarch.models.context import Context
from effarch.models.layers import executed, feature_maps, heads, linear, memory, norm


class LinearAttention(nnx.Module):
    """D (2 H K + 2 H V) + V parameters, and those of two feature maps."""

    def __init__(
        self,
        width: int,
        *,
        num_heads: int = 8,
        expand_k: float = 1.0,
        expand_v: float = 1.0,
        feature_map: str = "elu",
        normalize: bool = False,
        sum_features: bool = False,
        learnable_initial_state: bool = False,
        chunk_size: int | None = None,
        backend: str | None = None,
        norm_eps: float = 1e-6,
        init_std: float = 0.02,
        dtype=jnp.float32,
        param_dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        """expand_k = H K / width, expand_v = H V / width. Both `normalize` and `sum_features`, which
        makes the features of every query and key sum to 1, want positive features."""
        k_dim = heads.width_of("linear_attention", expand_k * width, num_heads)
        v_dim = heads.width_of("linear_attention", expand_v * width, num_heads)
        self.num_heads, self.v_dim = num_heads, v_dim
        self.normalize, self.sum_features = normalize, sum_features
        shared = dict(init_std=init_std, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        keys, values, columns = num_heads * k_dim, num_heads * v_dim, ("embed", "heads")
        self.q = linear.Linear(width, keys, axes=columns, head_dim=k_dim, **shared)
        self.k = linear.Linear(width, keys, axes=columns, head_dim=k_dim, **shared)
        self.v = linear.Linear(width, values, axes=columns, head_dim=v_dim, **shared)
        self.out = linear.Linear(values, width, axes=("heads", "embed"), head_dim=v_dim, **shared)
        options = dict(init_std=init_std, param_dtype=param_dtype, rngs=rngs)
        self.q_map = feature_maps.FeatureMap(feature_map, num_heads, k_dim, **options)
        self.k_map = feature_maps.FeatureMap(feature_map, num_heads, k_dim, **options)
        self.out_norm = norm.RMSNorm(v_dim, eps=norm_eps, param_dtype=param_dtype)
        self.memory = memory.Memory(
            *(num_heads, self.q_map.features, v_dim + normalize),
            learned=learnable_initial_state,
            chunk_size=chunk_size,
            backend=backend,
        )

    def __call__(self, x_BTD: Float[Array, "B T D"], ctx: Context, cache: dict | None = None):
        """Returns (y [B,T,D], cache, aux)."""
        q = self.q_map(heads.split(self.q(x_BTD), self.num_heads, ctx))
        k = self.k_map(heads.split(self.k(x_BTD), self.num_heads, ctx))
        if self.sum_features:
            q, k = norm.sum_normalize(q), norm.sum_normalize(k)
        v = heads.split(self.v(x_BTD), self.num_heads, ctx)
        if self.normalize:
            v = jnp.concatenate([v, jnp.ones_like(v[..., :1])], axis=-1).astype(jnp.float32)
        o, cache = self.memory.linear_attention(q, k, v, None, ctx, cache)
        if self.normalize:
            o = o[..., :-1] / (o[..., -1:] + 1e-10)
        o_BTF = heads.join(self.out_norm(o.astype(x_BTD.dtype)), ctx)
        return self.out(o_BTF), cache, {}

    def init_cache(self, batch: int, length: int) -> dict:
        """An empty state; `length` does not matter."""
        return self.memory.init_cache(batch)

    def forward_flops(self, seq_len: int) -> float:
        """The recurrence (write, read out) per token; no projections or feature maps."""
        return 4.0 * self.num_heads * self.q_map.features * (self.v_dim + self.normalize)

    def hardware_flops(self, seq_len: int) -> executed.Flops:
        """The recurrence as it runs, in chunks."""
        return self.memory.chunked_flops(executed.linear_attention, seq_len)
