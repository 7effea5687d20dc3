"""MoLE, mixture of latent experts (MoLAE), arXiv 2503.23100: experts share projections into latents.

    group g = e // group_size:   u = x B_up,g   v = x B_gate,g      (once a token and group)
    E_e(x) = (act(v A_gate,e) * (u A_up,e)) W_down,e                factor "up_gate", version 1
    ... W_down,e = A_down,e B_down,g                                factor "all", version 2

`tie_in` uses one latent for both (B_up = B_gate; ours, not of the paper). The equations rest on the
abstracts and on summaries: the paper's text was not at hand. Latents are made before tokens are sent
to the experts and, in version 2, leave the latent after they came back, so fewer bytes move.

Legend: G = groups of experts that share projections.
"""

import jax.numpy as jnp
from absl import logging
from flax import nnx
from jaxtyping import Array, Float

from effarch import names
from effarch.models.context import Context
from effarch.models.ffns import moe
from effarch.models.ffns.experts import latent as latent_experts
from effarch.models.ffns.experts import routers

FACTORS = ("up_gate", "all")


class Mole(moe.Moe):
    """Routed part: E*(2*L*F + F*D) + 2*G*L*D parameters; version 2: 3*E*L*F + 3*G*L*D; `tie_in` takes
    off G*L*D."""

    def __init__(
        self,
        width: int,
        *,
        group_size: int = 8,
        latent: int | None = None,
        factor: str = "up_gate",
        tie_in: bool = False,
        rngs: nnx.Rngs,
        **options,
    ):
        """`latent` (L) None: the width of an expert. `options` are those of Moe."""
        names.lookup(dict.fromkeys(FACTORS), factor, "mole.factor")
        self.group_size, self.latent = group_size, latent
        self.factor, self.tie_in = factor, tie_in
        super().__init__(width, rngs=rngs, **options)
        if self.exchange == "ring":
            raise ValueError(
                "mole.exchange='ring' would send every device the latents of all groups; use "
                "'all_to_all' or 'ragged'."
            )

    def make_experts(self, hidden: int, options: dict, shared: dict) -> None:
        latent = self.latent = self.latent or hidden
        _check(self.width, hidden, self.num_experts, self.group_size, latent)
        if self.factor == "all":
            _warn_of_many_groups(self.num_experts // self.group_size, self.top_k)
        self.experts = latent_experts.LatentExperts(
            self.width,
            hidden,
            self.num_experts,
            top_k=self.top_k,
            group_size=self.group_size,
            latent=latent,
            factor=self.factor,
            tie_in=self.tie_in,
            groups_per_token=self.groups_per_token,
            **options,
            **shared,
        )

    @property
    def groups_per_token(self) -> int:
        """The most latent groups that one token can touch."""
        experts_seen = self.num_experts * self.top_groups // self.num_groups
        whole = self.num_experts // self.num_groups % self.group_size == 0
        reach = experts_seen // self.group_size if whole else self.num_experts // self.group_size
        return min(self.top_k, reach, self.num_experts // self.group_size)

    def routed(self, x_BTD: Float[Array, "B T D"], routing: routers.Routing, ctx: Context):
        """The chosen experts' weighted sum [B,T,D] and aux."""
        y_BTD, aux = self.through_experts(x_BTD, routing, ctx)
        num_groups = self.num_experts // self.group_size
        groups_BTKG = routing.ids_BTK[..., None] // self.group_size == jnp.arange(num_groups)
        tokens = jnp.maximum(jnp.sum(routing.valid_BT), 1)
        aux["metric/latent_groups"] = jnp.sum(jnp.any(groups_BTKG, axis=2)) / tokens
        return y_BTD, aux


def _check(width, hidden, num_experts, group_size, latent) -> None:
    if group_size < 1 or num_experts % group_size:
        raise ValueError(
            f"mole.group_size={group_size} does not divide num_experts={num_experts}; use a divisor."
        )
    if not 1 <= latent <= min(width, group_size * hidden):
        raise ValueError(
            f"mole.latent={latent} must be from 1 to {min(width, group_size * hidden)}, the smaller of "
            "model.width and group_size * hidden: a wider latent adds nothing."
        )
    if latent * width >= group_size * hidden * (width - latent):
        logging.log_first_n(
            logging.WARNING,
            "mole: group_size=%d, latent=%d and hidden=%d have no fewer parameters than plain experts "
            "at width %d; use larger groups or a smaller latent.",
            1,
            group_size,
            latent,
            hidden,
            width,
        )


def _warn_of_many_groups(num_groups: int, top_k: int) -> None:
    """Each group that a token touches costs a projection on the way in and one on the way out."""
    expected = num_groups * (1 - (1 - 1 / num_groups) ** top_k)  # if choices fall evenly
    if expected > top_k / 2:
        logging.log_first_n(
            logging.WARNING,
            "mole: with factor='all' a token's %d experts would lie in %.1f of %d groups; larger groups "
            "share more.",
            1,
            top_k,
            expected,
            num_groups,
        )
