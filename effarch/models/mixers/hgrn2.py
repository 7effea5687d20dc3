"""HGRN2: Gated Linear RNNs with State Expansion, arXiv 2404.07904.

    S_t = diag(a_t) S_{t-1} + (1 - a_t) i_t^T,   o_t = S_t^T silu(q_t) / sqrt(K),   y = RMSNorm(o) W_out
    a = sigmoid(x W_f), bounded below if asked for

Gated linear attention whose key is what the gate forgets; the norm is over the whole width.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from effarch.models.context import Context
from effarch.models.layers import executed, forget_gate, heads, linear, memory, norm


class HGRN2(nnx.Module):
    """4 D^2 + D parameters (+ D with a lower bound) with H K = D; V = K."""

    def __init__(
        self,
        width: int,
        *,
        num_heads: int | None = None,
        head_dim: int = 128,
        lower_bound: float | None = None,
        bound_by_depth: bool = False,
        learnable_initial_state: bool = False,
        chunk_size: int | None = None,
        backend: str | None = None,
        norm_eps: float = 1e-6,
        init_std: float = 0.02,
        dtype=jnp.float32,
        param_dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        """num_heads None: width / head_dim; `lower_bound`: where the learned lower bound of a starts
        (0 to 1), None for none; `bound_by_depth`: at l / L in layer l of a model of L, as in the
        paper."""
        num_heads = heads.count("hgrn2", width, num_heads, head_dim)
        self.num_heads, self.head_dim = num_heads, head_dim
        shared = dict(init_std=init_std, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        inner, columns = num_heads * head_dim, ("embed", "heads")
        self.q = linear.Linear(width, inner, axes=columns, head_dim=head_dim, **shared)
        self.forget = linear.Linear(width, inner, axes=columns, head_dim=head_dim, **shared)
        self.input = linear.Linear(width, inner, axes=columns, head_dim=head_dim, **shared)
        self.out = linear.Linear(inner, width, axes=("heads", "embed"), head_dim=head_dim, **shared)
        self.forget_gate = forget_gate.ForgetGate(
            inner, lower_bound=lower_bound, by_depth=bound_by_depth
        )
        self.out_norm = norm.RMSNorm(inner, eps=norm_eps, param_dtype=param_dtype)
        self.memory = memory.Memory(
            *(num_heads, head_dim, head_dim),
            learned=learnable_initial_state,
            chunk_size=chunk_size,
            backend=backend,
        )

    def __call__(self, x_BTD: Float[Array, "B T D"], ctx: Context, cache: dict | None = None):
        """Returns (y [B,T,D], cache, aux)."""
        q = heads.split(jax.nn.silu(self.q(x_BTD)), self.num_heads, ctx)
        v = heads.split(self.input(x_BTD), self.num_heads, ctx)
        decay_log = self.forget_gate(self.forget(x_BTD))
        decay_log_BTHK = heads.split(decay_log, self.num_heads, ctx)
        k = -jnp.expm1(decay_log_BTHK).astype(q.dtype)
        o, cache = self.memory.linear_attention(q, k, v, decay_log_BTHK, ctx, cache)
        y = self.out(self.out_norm(heads.join(o, ctx)))
        return y, cache, {"metric/decay": jnp.mean(jnp.exp(decay_log))}

    def init_cache(self, batch: int, length: int) -> dict:
        """An empty state; `length` does not matter."""
        return self.memory.init_cache(batch)

    def forward_flops(self, seq_len: int) -> float:
        """The recurrence (write, read out, decay) per token; no projections."""
        return 5.0 * self.num_heads * self.head_dim**2

    def hardware_flops(self, seq_len: int) -> executed.Flops:
        """The recurrence as it runs, in chunks."""
        return self.memory.chunked_flops(executed.linear_attention, seq_len, per_channel=True)
