"""Gated linear attention: arXiv 2312.06635.

    S_t = diag(a_t) S_{t-1} + k_t v_t^T,   o_t = S_t^T q_t / sqrt(K)
    log a = logsigmoid(x W_1 W_2 + b) / 16,   y = (RMSNorm(o) * silu(x W_gate)) W_out

No convolution, no positions; W_1 W_2 has rank 16.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from effarch.models.context import Context
from effarch.models.layers import executed, heads, linear, low_rank, memory, norm


class GatedLinearAttention(nnx.Module):
    """D (2 H K + 3 H V) + R (D + H K) + H K + V parameters: 4 D^2 + ... at the default expansion."""

    def __init__(
        self,
        width: int,
        *,
        num_heads: int = 4,
        expand_k: float = 0.5,
        expand_v: float = 1.0,
        gate_rank: int = 16,
        gate_normalizer: float = 16.0,
        learnable_initial_state: bool = False,
        chunk_size: int | None = None,
        backend: str | None = None,
        norm_eps: float = 1e-6,
        init_std: float = 0.02,
        dtype=jnp.float32,
        param_dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        """expand_k = H K / width, expand_v = H V / width; `gate_normalizer` divides log a."""
        k_dim = heads.width_of("gla", expand_k * width, num_heads)
        v_dim = heads.width_of("gla", expand_v * width, num_heads)
        self.num_heads, self.k_dim, self.v_dim = num_heads, k_dim, v_dim
        self.gate_normalizer = gate_normalizer
        shared = dict(init_std=init_std, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        keys, values, columns = num_heads * k_dim, num_heads * v_dim, ("embed", "heads")
        self.q = linear.Linear(width, keys, axes=columns, head_dim=k_dim, **shared)
        self.k = linear.Linear(width, keys, axes=columns, head_dim=k_dim, **shared)
        self.v = linear.Linear(width, values, axes=columns, head_dim=v_dim, **shared)
        self.gate = linear.Linear(width, values, axes=columns, head_dim=v_dim, **shared)
        self.decay = low_rank.LowRank(width, gate_rank, keys, axes=columns, use_bias=True, **shared)
        self.out = linear.Linear(values, width, axes=("heads", "embed"), head_dim=v_dim, **shared)
        self.out_norm = norm.RMSNorm(v_dim, eps=norm_eps, param_dtype=param_dtype)
        self.memory = memory.Memory(
            *(num_heads, k_dim, v_dim),
            learned=learnable_initial_state,
            chunk_size=chunk_size,
            backend=backend,
        )

    def __call__(self, x_BTD: Float[Array, "B T D"], ctx: Context, cache: dict | None = None):
        """Returns (y [B,T,D], cache, aux)."""
        q, k, v, decay = (
            heads.split(y, self.num_heads, ctx)
            for y in (self.q(x_BTD), self.k(x_BTD), self.v(x_BTD), self.decay(x_BTD))
        )
        decay_log_BTHK = jax.nn.log_sigmoid(decay.astype(jnp.float32)) / self.gate_normalizer
        o, cache = self.memory.linear_attention(q, k, v, decay_log_BTHK, ctx, cache)
        o_BTF = heads.join(self.out_norm(o), ctx) * jax.nn.silu(self.gate(x_BTD))
        return self.out(o_BTF), cache, {"metric/decay": jnp.mean(jnp.exp(decay_log_BTHK))}

    def init_cache(self, batch: int, length: int) -> dict:
        """An empty state; `length` does not matter."""
        return self.memory.init_cache(batch)

    def forward_flops(self, seq_len: int) -> float:
        """The recurrence (write, read out, decay) per token; no projections."""
        return 5.0 * self.num_heads * self.k_dim * self.v_dim

    def hardware_flops(self, seq_len: int) -> executed.Flops:
        """The recurrence as it runs, in chunks."""
        return self.memory.chunked_flops(executed.linear_attention, seq_len, per_channel=True)
