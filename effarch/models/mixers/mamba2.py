"""Mamba-2: Transformers are SSMs, arXiv 2405.21060.

    S_t = exp(-A_h dt_t) S_{t-1} + B_t (dt_t x_t)^T,   y_t = S_t^T C_t + D_h x_t
    dt = softplus(input W_dt + dt_bias),   y = RMSNorm(y * silu(z)) W_out

x, B and C pass a causal depthwise convolution with bias and SiLU. All heads share one B and one C: keys
and queries of the linear attention; heads of x are its values. The norm is over all inner channels.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from effarch.models.context import Context
from effarch.models.layers import decay, executed, heads, linear, memory, norm, short_convs


class Mamba2(nnx.Module):
    """D (2 I + 2 N + HV) + (W + 1)(I + 2 N) + 3 HV + I + I D parameters, I = expand * D."""

    def __init__(
        self,
        width: int,
        *,
        expand: float = 2.0,
        head_dim: int = 64,
        state_dim: int = 128,
        conv_size: int = 4,
        learnable_initial_state: bool = False,
        chunk_size: int | None = None,
        backend: str | None = None,
        norm_eps: float = 1e-6,
        init_std: float = 0.02,
        dtype=jnp.float32,
        param_dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        """`head_dim` is V, `state_dim` K; conv_size 0 leaves the convolutions out."""
        inner = int(expand * width)
        self.num_heads = heads.count("mamba2", inner, None, head_dim)
        self.k_dim, self.v_dim = state_dim, head_dim
        shared = dict(init_std=init_std, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        columns = ("embed", "heads")
        self.z = linear.Linear(width, inner, axes=columns, head_dim=head_dim, **shared)
        self.x = linear.Linear(width, inner, axes=columns, head_dim=head_dim, **shared)
        self.b = linear.Linear(width, state_dim, axes=("embed", None), **shared)
        self.c = linear.Linear(width, state_dim, axes=("embed", None), **shared)
        self.step = linear.Linear(width, self.num_heads, axes=columns, **shared)
        self.out = linear.Linear(inner, width, axes=("heads", "embed"), head_dim=head_dim, **shared)
        self.rate = decay.DecayRate(self.num_heads, min_rate=1.0, rngs=rngs)
        self.skip = nnx.Param(jnp.ones((self.num_heads,)), logical=("heads",))
        self.out_norm = norm.RMSNorm(inner, eps=norm_eps, param_dtype=param_dtype)
        sizes = {"x": inner, "b": state_dim, "c": state_dim}
        self.conv = short_convs.ShortConvs(sizes, conv_size, use_bias=True, **shared)
        self.memory = memory.Memory(
            *(self.num_heads, state_dim, head_dim),
            learned=learnable_initial_state,
            chunk_size=chunk_size,
            backend=backend,
        )

    def __call__(self, x_BTD: Float[Array, "B T D"], ctx: Context, cache: dict | None = None):
        """Returns (y [B,T,D], cache, aux)."""
        projected = {"x": self.x(x_BTD), "b": self.b(x_BTD), "c": self.c(x_BTD)}
        projected, tails = self.conv(projected, ctx, None if cache is None else cache["conv"])
        x = heads.split(projected["x"], self.num_heads, ctx)
        # One head of keys and queries for all: whole on every device.
        k, q = (
            ctx.shard(projected[name][:, :, None], "batch", "time", None, None) for name in "bc"
        )
        step = self.step(x_BTD)
        decay_log_BTH = self.rate(step)
        v = self.rate.step(step)[..., None].astype(x.dtype) * x
        o, state = self.memory.linear_attention(q, k, v, decay_log_BTH, ctx, cache, scale=1.0)
        o += self.skip[...][:, None].astype(x.dtype) * x
        o_BTF = heads.join(o, ctx) * jax.nn.silu(self.z(x_BTD))
        y = self.out(self.out_norm(o_BTF))
        aux = {"metric/decay": jnp.mean(jnp.exp(decay_log_BTH))}
        return y, None if cache is None else state | {"conv": tails}, aux

    def init_cache(self, batch: int, length: int) -> dict:
        """An empty state and the convolutions' last inputs; `length` does not matter."""
        return self.memory.init_cache(batch) | {"conv": self.conv.init_cache(batch)}

    def forward_flops(self, seq_len: int) -> float:
        """The recurrence (write, read out, decay) per token; no projections or convolutions."""
        return 5.0 * self.num_heads * self.k_dim * self.v_dim

    def hardware_flops(self, seq_len: int) -> executed.Flops:
        """The recurrence as it runs, in chunks."""
        return self.memory.chunked_flops(executed.linear_attention, seq_len, num_k_heads=1)
