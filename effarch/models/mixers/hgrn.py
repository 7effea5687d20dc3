"""HGRN: Hierarchically Gated Recurrent Neural Network, arXiv 2311.04823, real-valued as later used.

    h_t = a_t h_{t-1} + (1 - a_t) silu(x_t W_i),   a = sigmoid(x W_f), bounded below if asked for
    y = (RMSNorm(h) * silu(x W_gate)) W_out

The state is a vector, the norm is over the whole width.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from effarch.kernels.vector_recurrence import api as vector_recurrence
from effarch.models.context import Context
from effarch.models.layers import forget_gate, learned_start, linear, norm


class HGRN(nnx.Module):
    """4 D^2 + D parameters (+ D with a lower bound); the state is D numbers."""

    def __init__(
        self,
        width: int,
        *,
        lower_bound: float | None = None,
        bound_by_depth: bool = False,
        learnable_initial_state: bool = False,
        backend: str | None = None,
        norm_eps: float = 1e-6,
        init_std: float = 0.02,
        dtype=jnp.float32,
        param_dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        """`lower_bound`: where the learned lower bound of a starts (0 to 1), None for none.
        `bound_by_depth`: it starts at l / L in layer l of a model of L, as in the paper."""
        self.backend = backend
        shared = dict(init_std=init_std, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        columns = ("embed", "heads")
        self.input = linear.Linear(width, width, axes=columns, **shared)
        self.forget = linear.Linear(width, width, axes=columns, **shared)
        self.gate = linear.Linear(width, width, axes=columns, **shared)
        self.out = linear.Linear(width, width, axes=("heads", "embed"), **shared)
        self.forget_gate = forget_gate.ForgetGate(
            width, lower_bound=lower_bound, by_depth=bound_by_depth
        )
        self.out_norm = norm.RMSNorm(width, eps=norm_eps, param_dtype=param_dtype)
        self.start = learned_start.Start((width,), learned=learnable_initial_state)

    def __call__(self, x_BTD: Float[Array, "B T D"], ctx: Context, cache: dict | None = None):
        """Returns (y [B,T,D], cache, aux)."""
        decay_log_BTD = self.forget_gate(self.forget(x_BTD))
        new_BTD = -jnp.expm1(decay_log_BTD) * jax.nn.silu(self.input(x_BTD).astype(jnp.float32))
        if self.start.is_learned and ctx.segment_ids is not None:
            opens = learned_start.later_starts(ctx)[..., None]
            new_BTD += jnp.where(opens, jnp.exp(decay_log_BTD) * self.start.value[...], 0)
        h, state = vector_recurrence.vector_recurrence(
            new_BTD,
            decay_log_BTD,
            initial_state=self.start.initial_state(x_BTD.shape[0], cache),
            segment_ids=ctx.segment_ids,
            backend=self.backend,
        )
        h = ctx.shard(self.out_norm(h.astype(x_BTD.dtype)), "batch", "time", "heads")
        y = self.out(h * jax.nn.silu(self.gate(x_BTD)))
        aux = {"metric/decay": jnp.mean(jnp.exp(decay_log_BTD))}
        return y, self.start.next_cache(state, cache), aux

    def init_cache(self, batch: int, length: int) -> dict:
        """An empty state; `length` does not matter."""
        return self.start.init_cache(batch)

    def forward_flops(self, seq_len: int) -> float:
        """The recurrence per token: a multiply-add a channel; no projections."""
        return 2.0 * self.out.sizes[0]
