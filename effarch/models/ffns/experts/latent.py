"""The experts of MoLE: private cores behind projections that the experts of a group share.

See `effarch/models/ffns/mole.py` for the equations. Each token's latents are made once for each of its
distinct groups, then copied to the rows of its experts.

Legend: G = groups of experts, P = distinct groups of a token at most, C = what a latent row holds.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Int

from effarch import names
from effarch.kernels.grouped_matmul import rows
from effarch.models.ffns.experts import dispatch, products
from effarch.models.ffns.experts.exchange import Exchange
from effarch.models.layers import activations


class LatentExperts(products.GroupedProducts):
    """With g distinct groups of a token: 4*g*L*D + 4*K*L*F + 2*K*F*D FLOPs per token (version 2:
    6*g*L*D + 6*K*L*F; `tie_in`: less 2*g*L*D), counted with the largest possible g."""

    def __init__(
        self,
        width: int,
        hidden: int,
        num_experts: int,
        *,
        top_k: int,
        group_size: int,
        latent: int,
        factor: str,
        tie_in: bool,
        groups_per_token: int,
        activation: str = "silu",
        backend: str | None = None,
        init_std: float = 0.02,
        dtype=jnp.float32,
        param_dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.activation = names.lookup(activations.FUNCTIONS, activation, "mole.activation")
        self.sizes = (num_experts, width, hidden, latent)
        self.num_groups, self.group_size = num_experts // group_size, group_size
        self.top_k, self.groups_per_token = top_k, groups_per_token
        self.factor, self.tie_in, self.backend, self.dtype = factor, tie_in, backend, dtype

        def param(count, rows, columns, std, axes):
            shape = (count, rows, columns)
            kernel = std * jax.random.normal(rngs.params(), shape, param_dtype)
            return nnx.Param(kernel, logical=("experts", *axes))

        # B makes latents of unit variance; A brings the product to the variance of a plain expert.
        out_of_latent = init_std * (width / latent) ** 0.5
        for name in ("latent_in",) if tie_in else ("latent_gate", "latent_up"):
            kernel = param(self.num_groups, width, latent, width**-0.5, ("embed", "latent"))
            setattr(self, name, kernel)
        for name in ("gate", "up"):
            kernel = param(num_experts, latent, hidden, out_of_latent, ("latent", "ffn"))
            setattr(self, name, kernel)
        if factor == "up_gate":
            self.down = param(num_experts, hidden, width, init_std, ("ffn", "embed"))
        else:
            out_of_latent = init_std * (hidden / latent) ** 0.5
            self.down = param(num_experts, hidden, latent, hidden**-0.5, ("ffn", "latent"))
            self.latent_out = param(
                self.num_groups, latent, width, out_of_latent, ("latent", "embed")
            )

    @property
    def product_sizes(self) -> tuple[tuple[int, int], ...]:
        """(inputs, outputs) of the products of one group and one expert."""
        _, width, hidden, latent = self.sizes
        sizes = ((width, latent), (latent, hidden))
        if self.factor == "up_gate":
            return *sizes, (hidden, width)
        return *sizes, (hidden, latent), (latent, width)

    @property
    def row_widths(self) -> tuple[int, int]:
        """Numbers of a row that travels to an expert, and of one that comes back."""
        _, width, _, latent = self.sizes
        return latent * (2 - self.tie_in), width if self.factor == "up_gate" else latent

    def weights(self) -> dict[str, Array]:
        """The arrays that `compute` takes."""
        kept = ["gate", "up", "down"]
        kept += ["latent_in"] if self.tie_in else ["latent_gate", "latent_up"]
        kept += ["latent_out"] if self.factor == "all" else []
        return {name: getattr(self, name)[...] for name in kept}

    def logical(self) -> dict[str, tuple[str | None, ...]]:
        """How a device sees them: its own experts and hidden channels, and all shared projections."""
        own = {"gate": ("experts", None, "ffn"), "up": ("experts", None, "ffn")}
        shared = ("latent_in", "latent_gate", "latent_up", "latent_out")
        return {**own, "down": ("experts", "ffn", None), **dict.fromkeys(shared, (None,) * 3)}

    def compute(self, weights: dict, x_ND, ids_NK, weights_NK, exchange: Exchange):
        """The weighted sum over the chosen experts [N,D], and which choices had a row; on one
        device's pieces."""
        pair_NK, pair_ids_NP = distinct_groups(
            ids_NK // self.group_size, self.num_groups, self.groups_per_token
        )
        pairs = dispatch.dropless(pair_ids_NP, self.num_groups)
        of_choice_NKP = jax.nn.one_hot(pair_NK, pair_ids_NP.shape[1], dtype=self.dtype)
        z_NPC = self._latents(weights, x_ND, pairs, pair_ids_NP.shape)
        z_NKC = jnp.einsum("nkp,npc->nkc", of_choice_NKP, z_NPC)
        z_NC = z_NKC.reshape(-1, z_NKC.shape[-1])
        y_M, plan = exchange.run(lambda z, plan: self._rows(weights, z, plan), z_NC, ids_NK)
        if self.factor == "up_gate":
            return dispatch.collect(y_M, weights_NK, plan), plan.is_sent
        y_NKL = rows.take(y_M, plan.slots_NK.reshape(-1), plan.choices_M)
        y_NKL = y_NKL.reshape(*ids_NK.shape, -1) * weights_NK[..., None].astype(y_M.dtype)
        y_NPL = jnp.einsum("nkp,nkl->npl", of_choice_NKP, y_NKL)
        y_M = dispatch.send(y_NPL.reshape(-1, y_NPL.shape[-1]), pairs.per_choice)
        y_M = self.product(y_M, weights, "latent_out", pairs)
        ones_NP = jnp.ones(pair_ids_NP.shape, jnp.float32)
        return dispatch.collect(y_M, ones_NP, pairs), plan.is_sent

    def _latents(self, weights, x_ND, pairs: dispatch.Plan, shape):
        """The latents of each token's groups, [N,P,2 L] (gate first), or [N,P,L] if tied."""
        x_MD = dispatch.send(x_ND.astype(self.dtype), pairs)
        parts = ("latent_in",) if self.tie_in else ("latent_gate", "latent_up")
        z_MC = jnp.concatenate([self.product(x_MD, weights, p, pairs) for p in parts], axis=-1)
        return rows.take(z_MC, pairs.slots_NK.reshape(-1), pairs.choices_M).reshape(*shape, -1)

    def _rows(self, weights, z_MC, plan: dispatch.Plan):
        of_gate, of_up = (z_MC, z_MC) if self.tie_in else jnp.split(z_MC, 2, axis=-1)
        gate_MF = self.product(of_gate, weights, "gate", plan)
        h_MF = self.activation(gate_MF) * self.product(of_up, weights, "up", plan)
        return self.product(h_MF, weights, "down", plan)

    def forward_flops(self, seq_len: int) -> float:
        """Per token; the sequence length does not matter."""
        return 2.0 * self._params(self.groups_per_token, self.top_k)

    def idle_params(self) -> int:
        """Weights of the experts and groups that a token does not choose."""
        everything = self._params(self.num_groups, self.sizes[0])
        return everything - self._params(self.groups_per_token, self.top_k)

    def _params(self, num_groups: int, num_experts: int) -> int:
        _, width, hidden, latent = self.sizes
        is_v2 = self.factor == "all"
        per_expert = 2 * latent * hidden + hidden * (latent if is_v2 else width)
        per_group = (2 - self.tie_in + is_v2) * latent * width
        return num_experts * per_expert + num_groups * per_group


def distinct_groups(
    groups_NK: Int[Array, "N K"], num_groups: int, most: int
) -> tuple[Int[Array, "N K"], Int[Array, "N P"]]:
    """Which of its distinct groups each choice has, and each token's distinct groups, G for none.

    Group G (no choice) is not counted; its choices get any index.
    """
    num_choices = groups_NK.shape[1]
    earliest_NK = jnp.argmax(groups_NK[:, :, None] == groups_NK[:, None, :], axis=-1)
    is_first_NK = (earliest_NK == jnp.arange(num_choices)) & (groups_NK < num_groups)
    index_NK = jnp.cumsum(is_first_NK, axis=-1) - 1
    pair_NK = jnp.take_along_axis(index_NK, earliest_NK, axis=-1)
    here_NKP = is_first_NK[..., None] & (pair_NK[..., None] == jnp.arange(most))
    return pair_NK, jnp.min(jnp.where(here_NKP, groups_NK[..., None], num_groups), axis=1)
