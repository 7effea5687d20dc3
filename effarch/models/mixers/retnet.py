"""RetNet: Retentive Network, arXiv 2307.08621.

    S_t = a_h S_{t-1} + k_t v_t^T,   o_t = S_t^T q_t / sqrt(K),   a_h = 1 - 2^(-5-h), h = 0, 1, ...
    y = (RMSNorm(o) * silu(x W_gate)) W_out

q and k carry rotary positions, which restart in every document.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from effarch.models.context import Context
from effarch.models.layers import executed, heads, linear, memory, norm, rotary


class RetNet(nnx.Module):
    """D (2 H K + 3 H V) + V parameters: 8 D^2 + V at the default expansion (its GLU has ratio 2)."""

    def __init__(
        self,
        width: int,
        *,
        num_heads: int = 8,
        expand_k: float = 1.0,
        expand_v: float = 2.0,
        rope_theta: float = 10000.0,
        learnable_initial_state: bool = False,
        chunk_size: int | None = None,
        backend: str | None = None,
        norm_eps: float = 1e-6,
        init_std: float = 0.02,
        dtype=jnp.float32,
        param_dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        """expand_k = H K / width, expand_v = H V / width."""
        k_dim = heads.width_of("retnet", expand_k * width, num_heads)
        v_dim = heads.width_of("retnet", expand_v * width, num_heads)
        if k_dim % 2:
            raise ValueError(
                f"retnet: rotary positions need an even number of key channels per head, got {k_dim}; "
                "change num_heads or expand_k."
            )
        self.num_heads, self.k_dim, self.v_dim = num_heads, k_dim, v_dim
        self.rope_theta = rope_theta
        shared = dict(init_std=init_std, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        keys, values, columns = num_heads * k_dim, num_heads * v_dim, ("embed", "heads")
        self.q = linear.Linear(width, keys, axes=columns, head_dim=k_dim, **shared)
        self.k = linear.Linear(width, keys, axes=columns, head_dim=k_dim, **shared)
        self.v = linear.Linear(width, values, axes=columns, head_dim=v_dim, **shared)
        self.gate = linear.Linear(width, values, axes=columns, head_dim=v_dim, **shared)
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
        positions = ctx.token_positions(x_BTD)
        q = heads.split(self.q(x_BTD), self.num_heads, ctx)
        k = heads.split(self.k(x_BTD), self.num_heads, ctx)
        q, k = (rotary.rotate(x, positions, theta=self.rope_theta) for x in (q, k))
        v = heads.split(self.v(x_BTD), self.num_heads, ctx)
        o, cache = self.memory.linear_attention(q, k, v, self._decay_log(), ctx, cache)
        o_BTF = heads.join(self.out_norm(o), ctx) * jax.nn.silu(self.gate(x_BTD))
        return self.out(o_BTF), cache, {}

    def _decay_log(self) -> Float[Array, " H"]:
        return jnp.asarray(np.log1p(-(2.0 ** -(5.0 + np.arange(self.num_heads)))), jnp.float32)

    def init_cache(self, batch: int, length: int) -> dict:
        """An empty state; `length` does not matter."""
        return self.memory.init_cache(batch)

    def forward_flops(self, seq_len: int) -> float:
        """The recurrence (write, read out, decay) per token; no projections."""
        return 5.0 * self.num_heads * self.k_dim * self.v_dim

    def hardware_flops(self, seq_len: int) -> executed.Flops:
        """The recurrence as it runs, in chunks."""
        return self.memory.chunked_flops(executed.linear_attention, seq_len)
