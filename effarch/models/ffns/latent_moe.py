"""LatentMoE: experts that live wholly in a latent of the stream, NVIDIA, arXiv 2601.18089 (Nemotron-3).

    y = (sum over the chosen e of w_e E_e(x W_in)) W_out + S(x),   W_in [D,L], W_out [L,D]

Router and shared experts read the full x. What is sent to the experts and back is L wide, and the saved
bytes and FLOPs pay for more and smaller experts. Nemotron's experts are not gated and use relu2.
"""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from effarch.models.context import Context
from effarch.models.ffns import moe
from effarch.models.ffns.experts import gated, routers
from effarch.models.layers import linear


class LatentMoe(moe.Moe):
    """3*L*F*E + 2*D*L + D*E parameters, 6*L*F*K + 4*D*L + 2*D*E FLOPs per token, without shared."""

    def __init__(
        self,
        width: int,
        *,
        latent: int | None = None,
        is_gated: bool = True,
        rngs: nnx.Rngs,
        **options,
    ):
        """`latent` (L) None: a quarter of the width. `options` are those of Moe."""
        self.latent = width // 4 if latent is None else latent
        self.is_gated = is_gated
        if not 1 <= self.latent <= width:
            raise ValueError(
                f"latent_moe.latent={self.latent} must be from 1 to model.width={width}: a wider latent "
                "adds nothing."
            )
        super().__init__(width, rngs=rngs, **options)

    def make_experts(self, hidden: int, options: dict, shared: dict) -> None:
        self.project_in = linear.Linear(self.width, self.latent, axes=("embed", "latent"), **shared)
        self.project_out = linear.Linear(
            self.latent, self.width, axes=("latent", "embed"), **shared
        )
        self.experts = gated.Experts(
            self.latent,
            hidden,
            self.num_experts,
            top_k=self.top_k,
            gated=self.is_gated,
            **options,
            **shared,
        )

    def routed(self, x_BTD: Float[Array, "B T D"], routing: routers.Routing, ctx: Context):
        """The chosen experts' weighted sum [B,T,D] and aux; sums are formed in the latent."""
        y_BTL, aux = self.through_experts(self.project_in(x_BTD), routing, ctx)
        return self.project_out(y_BTL.astype(jnp.result_type(x_BTD))), aux
