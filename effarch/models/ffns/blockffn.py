"""BlockFFN: experts switched on by a ReLU router, as many as a token wants, arXiv 2507.08771.

    a = relu(x W_r),  r = gamma * a / sqrt(mean_e(a_e^2) + eps),  y = sum_e r_e silu(x U_e) D_e

Computed as one wide feed-forward whose blocks are scaled by r: in training more tokens are in flight
than are saved by sparsity. The losses that make neighbours share experts are in `experts/sparsity.py`.

Legend: F = width of one expert.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from effarch.models import state as state_lib
from effarch.models.context import Context
from effarch.models.ffns.experts import sparsity
from effarch.models.layers import linear


class BlockFfn(nnx.Module):
    """2*D*F*E + D*E + E parameters; 4*D*F*E + 2*D*E FLOPs per token, of which only the share
    1 - `metric/token_sparsity` of the first term would be needed."""

    def __init__(
        self,
        width: int,
        *,
        num_experts: int = 32,
        hidden: int = 64,
        chunk_coef: float = 5e-2,
        chunk_size: int = 64,
        locality_coef: float = 1e-3,
        locality_sharpness: float = 100.0,
        norm_eps: float = 1e-6,
        init_std: float = 0.02,
        dtype=jnp.float32,
        param_dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        """`hidden` (F) is the width of one expert, `chunk_size` the tokens of a chunk of the chunk-level
        loss; a coefficient of 0 turns a loss off."""
        for name, value in (
            ("num_experts", num_experts),
            ("hidden", hidden),
            ("chunk_size", chunk_size),
        ):
            if value < 1:
                raise ValueError(f"blockffn.{name}={value} must be at least 1.")
        self.num_experts, self.eps = num_experts, norm_eps
        self.chunk_coef, self.chunk_size = chunk_coef, chunk_size
        self.locality_coef, self.locality_sharpness = locality_coef, locality_sharpness
        shared = dict(init_std=init_std, param_dtype=param_dtype, rngs=rngs)
        sizes, axes = (width, num_experts * hidden), ("embed", "ffn")
        self.router = linear.Linear(
            width, num_experts, axes=("embed", "router"), dtype=jnp.float32, **shared
        )
        self.scale = nnx.Param(jnp.ones((num_experts,), param_dtype), logical=("norm",))
        self.up = linear.Linear(*sizes, axes=axes, dtype=dtype, **shared)
        self.down = linear.Linear(*sizes[::-1], axes=axes[::-1], dtype=dtype, **shared)
        if chunk_coef:
            self.schedule = state_lib.ModelState(sparsity.initial(chunk_coef), logical=(None,))

    def __call__(self, x_BTD: Float[Array, "B T D"], ctx: Context):
        """Returns (y [B,T,D], aux)."""
        z_BTE = self.router(x_BTD.astype(jnp.float32))
        a_BTE = jax.nn.relu(z_BTE)
        a_BTE *= jax.lax.rsqrt(jnp.mean(a_BTE**2, axis=-1, keepdims=True) + self.eps)
        h_BTF = jax.nn.silu(self.up(x_BTD))
        r_BTE1 = (a_BTE * self.scale[...]).astype(h_BTF.dtype)[..., None]
        h_BTF = (h_BTF.reshape(*a_BTE.shape, -1) * r_BTE1).reshape(h_BTF.shape)
        y_BTD = self.down(ctx.shard(h_BTF, "batch", "time", "ffn"))
        return y_BTD, self._aux(z_BTE, a_BTE, ctx) if ctx.train else {}

    def _aux(self, z_BTE, a_BTE, ctx: Context) -> dict[str, Array]:
        segments_BT = ctx.segment_ids
        if segments_BT is None:
            segments_BT = jnp.ones(z_BTE.shape[:2], jnp.int32)
        aux = sparsity.metrics(a_BTE > 0, segments_BT != 0)
        if self.chunk_coef:
            loss = sparsity.chunk_loss(a_BTE, segments_BT != 0, self.chunk_size)
            aux["metric/chunk_loss"] = loss
            aux["metric/chunk_coef"] = sparsity.coefficient(self.schedule[...])
            aux["loss/chunk_sparsity"] = aux["metric/chunk_coef"] * loss
        if self.locality_coef:
            loss = sparsity.locality_loss(z_BTE, segments_BT, self.locality_sharpness)
            aux["loss/expert_locality"] = self.locality_coef * loss
        return aux

    def next_state(self, state: dict, aux: dict, probes: dict) -> dict:
        """The coefficient of the chunk-level loss after a step."""
        del probes
        if not state:
            return state
        return {
            "schedule": sparsity.advance(
                state["schedule"], aux["metric/chunk_loss"], self.chunk_coef
            )
        }
