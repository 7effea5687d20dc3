"""Gated DeltaNet: Gated Delta Networks, arXiv 2412.06464.

    S_t = a_t (I - b_t k_t k_t^T) S_{t-1} + b_t k_t v_t^T,   o_t = S_t^T q_t / sqrt(K)
    a = exp(-exp(A_log) softplus(x W_a + dt_bias)),   b = sigmoid(x W_b) (doubled: negative eigenvalues)
    y = (RMSNorm(o) * silu(x W_gate)) W_out

q, k and v pass a causal depthwise convolution with SiLU; q and k are L2-normalised. Value heads may
outnumber key heads: value head h reads key head h // (HV // H).
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from effarch.models.context import Context
from effarch.models.layers import decay, executed, heads, linear, memory, norm, short_convs


class GatedDeltaNet(nnx.Module):
    """D (2 H K + 3 HV V) + 2 D HV + W (2 H K + HV V) + 2 HV + V parameters (gate and convolution on)."""

    def __init__(
        self,
        width: int,
        *,
        num_heads: int = 6,
        num_v_heads: int | None = None,
        head_dim: int = 128,
        expand_v: float = 2.0,
        conv_size: int = 4,
        use_gate: bool = True,
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
        """`head_dim` is K, `expand_v` V / K; conv_size 0 leaves the convolutions out."""
        num_v_heads = num_v_heads or num_heads
        if num_v_heads % num_heads:
            raise ValueError(
                f"gated_delta_net: num_v_heads={num_v_heads} is not a multiple of "
                f"num_heads={num_heads}."
            )
        self.num_heads, self.num_v_heads = num_heads, num_v_heads
        self.k_dim, self.v_dim = head_dim, int(head_dim * expand_v)
        self.use_gate, self.beta_scale = use_gate, 2.0 if allow_neg_eigval else 1.0
        shared = dict(init_std=init_std, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        keys, values = num_heads * self.k_dim, num_v_heads * self.v_dim
        columns = ("embed", "heads")
        self.q = linear.Linear(width, keys, axes=columns, head_dim=self.k_dim, **shared)
        self.k = linear.Linear(width, keys, axes=columns, head_dim=self.k_dim, **shared)
        self.v = linear.Linear(width, values, axes=columns, head_dim=self.v_dim, **shared)
        self.decay = linear.Linear(width, num_v_heads, axes=columns, **shared)
        self.beta = linear.Linear(width, num_v_heads, axes=columns, **shared)
        self.out = linear.Linear(
            values, width, axes=("heads", "embed"), head_dim=self.v_dim, **shared
        )
        self.rate = decay.DecayRate(num_v_heads, rngs=rngs)
        self.out_norm = norm.RMSNorm(self.v_dim, eps=norm_eps, param_dtype=param_dtype)
        if use_gate:
            self.gate = linear.Linear(width, values, axes=columns, head_dim=self.v_dim, **shared)
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
        decay_log_BTH = self.rate(self.decay(x_BTD))
        o, state = self.memory.delta_rule(q, k, v, beta_BTH, decay_log_BTH, ctx, cache)
        o_BTF = heads.join(self.out_norm(o), ctx)
        if self.use_gate:
            o_BTF = o_BTF * jax.nn.silu(self.gate(x_BTD))
        aux = {
            "metric/delta_beta": jnp.mean(beta_BTH),
            "metric/delta_decay": jnp.mean(jnp.exp(decay_log_BTH)),
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
        return self.memory.chunked_flops(executed.delta_rule, seq_len, num_k_heads=self.num_heads)
