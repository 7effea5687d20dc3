"""Gated feed-forwards with few active neurons: by a threshold, by sorting or by their activation.

    y = (act(S(x W_gate)) * act_up(x W_up)) W_down

    S statistical   Gemma 3n (active_fraction 0.05): max(g - mean - std * Q(1 - active_fraction), 0)
    S exact         the k largest of each token, by sorting
    S none          activation relu, relu2; dReLU is relu with up_activation relu, arXiv 2406.05955

The gate reads all of x, so that only the other two products can leave neurons out; `spark_ffn` halves
the first as well. `density_coef` adds DEFT's loss, which pushes small activations to 0,
arXiv 2402.01911.
"""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from effarch import names
from effarch.kernels.topk import api as topk
from effarch.models import remat
from effarch.models.context import Context
from effarch.models.ffns import active, glu
from effarch.models.layers import activations, linear

SELECTIONS = ("statistical", "exact", "none")


class SparseGlu(nnx.Module):
    """3*D*F parameters; 6*D*F FLOPs per token, of which 2*D*F + 4*D*k serve active neurons.

    In training all are computed; in decoding only active neurons are read.
    """

    def __init__(
        self,
        width: int,
        *,
        hidden: int | None = None,
        selection: str = "statistical",
        active_fraction: float = 0.08,
        activation: str = "gelu_tanh",
        up_activation: str | None = None,
        density_coef: float = 0.0,
        init_std: float = 0.02,
        dtype=jnp.float32,
        param_dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        """`active_fraction`: k / F, for the selections that choose. `hidden` None: as in `glu`."""
        names.lookup(dict.fromkeys(SELECTIONS), selection, "sparse_glu.selection")
        active.check_fraction("sparse_glu", active_fraction)
        hidden = hidden or glu.default_hidden(width)
        self.selection, self.active_fraction = selection, active_fraction
        self.activation = activations.make(
            activation, "sparse_glu.activation", param_dtype=param_dtype
        )
        self.up_activation = up_activation and activations.make(
            up_activation, "sparse_glu.up_activation", param_dtype=param_dtype
        )
        self.density_coef = density_coef
        shared = dict(init_std=init_std, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.gate = linear.Linear(width, hidden, axes=("embed", "ffn"), **shared)
        self.up = linear.Linear(width, hidden, axes=("embed", "ffn"), by_outputs=True, **shared)
        self.down = linear.Linear(hidden, width, axes=("ffn", "embed"), **shared)

    def __call__(self, x_BTD: Float[Array, "B T D"], ctx: Context):
        """Returns (y [B,T,D], aux)."""
        g_BTF = remat.tag(self.gate(x_BTD), "ffn_gate")
        g_BTF = self._select(ctx.shard(g_BTF, "batch", "time", "ffn"))
        g_BTF = self.activation(g_BTF)
        if self.up_activation is None:
            y_BTD, h_BTF = active.finish(g_BTF, x_BTD, self.up, self.down, ctx)
        else:
            h_BTF = g_BTF * self.up_activation(self.up(x_BTD))
            y_BTD = self.down(ctx.shard(h_BTF, "batch", "time", "ffn"))
        return y_BTD, self._aux(h_BTF, ctx) if ctx.train else {}

    def _select(self, g_BTF):
        if self.selection == "statistical":
            return topk.gaussian_top_k(g_BTF, 1 - self.active_fraction)
        if self.selection == "exact":
            return topk.exact_top_k(g_BTF, self._num_active(g_BTF.shape[-1]))
        return g_BTF

    def _num_active(self, hidden: int) -> int:
        return max(1, round(self.active_fraction * hidden))

    def _aux(self, h_BTF, ctx: Context) -> dict[str, Array]:
        aux = {"metric/active_fraction": active.fraction(h_BTF, ctx)}
        if self.density_coef:
            aux["loss/density"] = self.density_coef * active.density(h_BTF, ctx)
        return aux

    def idle_flops(self, seq_len: int) -> float:
        """Forward FLOPs per token of inactive neurons; 0 where only a run shows how many they are."""
        if self.selection == "none":
            return 0.0
        hidden, width = self.down.sizes
        return 4.0 * width * (hidden - self._num_active(hidden))
