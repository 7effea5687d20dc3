"""Kimi Delta Attention: Kimi Linear, arXiv 2510.26692.

    S_t = (I - b_t k_t k_t^T) diag(a_t) S_{t-1} + b_t k_t v_t^T,   o_t = S_t^T q_t / sqrt(K)
    log a = -exp(A_log) softplus(x W_f + dt_bias) per key channel, or bounded:
    log a = bound * sigmoid(exp(A_log) (x W_f + dt_bias));   b = sigmoid(x W_b)
    y = (RMSNorm(o) * sigmoid(x W_gate + c)) W_out

As Gated DeltaNet with a gate per channel; W_f and W_gate go through V channels.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from effarch.models.context import Context
from effarch.models.layers import (
    decay,
    executed,
    heads,
    linear,
    low_rank,
    memory,
    norm,
    short_convs,
)


class KimiDeltaAttention(nnx.Module):
    """D (2 H K + 2 HV V) + D HV + V (2 D + HV K + HV V) + HV V + HV K + HV + W (2 H K + HV V) + V
    parameters."""

    def __init__(
        self,
        width: int,
        *,
        num_heads: int | None = None,
        num_v_heads: int | None = None,
        head_dim: int = 128,
        expand_v: float = 1.0,
        conv_size: int = 4,
        gate_lower_bound: float | None = None,
        allow_neg_eigval: bool = False,
        learnable_initial_state: bool = False,
        chunk_size: int | None = None,
        backend: str | None = None,
        norm_eps: float = 1e-6,
        init_std: float = 0.02,
        dtype=jnp.float32,
        param_dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        """num_heads None: width / head_dim; gate_lower_bound: of the log decay, in [-5, 0)."""
        num_heads = heads.count("kda", width, num_heads, head_dim)
        num_v_heads = num_v_heads or num_heads
        if num_v_heads % num_heads:
            raise ValueError(
                f"kda: num_v_heads={num_v_heads} is not a multiple of num_heads={num_heads}."
            )
        self.num_heads, self.num_v_heads = num_heads, num_v_heads
        self.k_dim, self.v_dim = head_dim, int(head_dim * expand_v)
        self.beta_scale = 2.0 if allow_neg_eigval else 1.0
        shared = dict(init_std=init_std, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        keys, values = num_heads * self.k_dim, num_v_heads * self.v_dim
        columns = ("embed", "heads")
        self.q = linear.Linear(width, keys, axes=columns, head_dim=self.k_dim, **shared)
        self.k = linear.Linear(width, keys, axes=columns, head_dim=self.k_dim, **shared)
        self.v = linear.Linear(width, values, axes=columns, head_dim=self.v_dim, **shared)
        self.beta = linear.Linear(width, num_v_heads, axes=columns, **shared)
        self.out = linear.Linear(
            values, width, axes=("heads", "embed"), head_dim=self.v_dim, **shared
        )
        self.decay = low_rank.LowRank(
            width, self.v_dim, num_v_heads * self.k_dim, axes=columns, **shared
        )
        self.gate = low_rank.LowRank(
            width, self.v_dim, values, axes=columns, use_bias=True, **shared
        )
        self.rate = decay.DecayRate(
            num_v_heads,
            channels=self.k_dim,
            min_rate=1.0,
            lower_bound=gate_lower_bound,
            rngs=rngs,
        )
        self.out_norm = norm.RMSNorm(self.v_dim, eps=norm_eps, param_dtype=param_dtype)
        sizes = {"q": keys, "k": keys, "v": values}
        self.conv = short_convs.ShortConvs(sizes, conv_size, **shared)
        self.memory = memory.Memory(
            *(num_v_heads, self.k_dim, self.v_dim),
            learned=learnable_initial_state,
            chunk_size=chunk_size,
            backend=backend,
        )

    def __call__(self, x_BTD: Float[Array, "B T D"], ctx: Context, cache: dict | None = None):
        """Returns (y [B,T,D], cache, aux)."""
        projected = {"q": self.q(x_BTD), "k": self.k(x_BTD), "v": self.v(x_BTD)}
        projected, tails = self.conv(projected, ctx, None if cache is None else cache["conv"])
        q = norm.l2_normalize(heads.split(projected["q"], self.num_heads, ctx))
        k = norm.l2_normalize(heads.split(projected["k"], self.num_heads, ctx))
        v = heads.split(projected["v"], self.num_v_heads, ctx)
        beta_BTH = self.beta_scale * jax.nn.sigmoid(self.beta(x_BTD).astype(jnp.float32))
        decay_log_BTHK = self.rate(heads.split(self.decay(x_BTD), self.num_v_heads, ctx))
        o, state = self.memory.delta_rule(q, k, v, beta_BTH, decay_log_BTHK, ctx, cache)
        o_BTF = heads.join(self.out_norm(o), ctx) * jax.nn.sigmoid(self.gate(x_BTD))
        aux = {
            "metric/delta_beta": jnp.mean(beta_BTH),
            "metric/delta_decay": jnp.mean(jnp.exp(decay_log_BTHK)),
        }
        return self.out(o_BTF), None if cache is None else state | {"conv": tails}, aux

    def init_cache(self, batch: int, length: int) -> dict:
        """An empty state and the convolutions' last inputs; `length` does not matter."""
        return self.memory.init_cache(batch) | {"conv": self.conv.init_cache(batch)}

    def forward_flops(self, seq_len: int) -> float:
        """The recurrence (read, write, read out, decay) per token; no projections or convolutions."""
        return 7.0 * self.num_v_heads * self.k_dim * self.v_dim

    def hardware_flops(self, seq_len: int) -> executed.Flops:
        """The recurrence as it runs, in chunks."""
        return self.memory.chunked_flops(executed.delta_rule, seq_len, per_channel=True)
