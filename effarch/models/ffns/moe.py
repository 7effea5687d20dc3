"""Mixture of experts: each token passes through the few feed-forwards that a router chooses for it.

    y = sum over the chosen e of w_e E_e(x) + S(x),   E_e(x) = (act(x W_gate,e) * (x W_up,e)) W_down,e

Outrageously Large Neural Networks, arXiv 1701.06538; fine-grained and shared experts S: DeepSeekMoE,
arXiv 2401.06066. The parts are in `experts/`: routers, router_state, router_losses, dispatch, exchange,
gated.
"""

from typing import NamedTuple

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from effarch import names
from effarch.kernels.grouped_matmul import api as grouped_matmul
from effarch.models.context import Context
from effarch.models.ffns import glu
from effarch.models.ffns.experts import exchange as exchanges
from effarch.models.ffns.experts import (
    gated,
    router_losses,
    router_state,
    routers,
)


class Losses(NamedTuple):
    """Coefficients; 0 is off."""

    balance: float
    z: float
    top1: float
    top1_temperature: float


class Moe(nnx.Module):
    """E experts of which a token uses K, and shared ones.  3*D*F*(E + shared) + D*E parameters."""

    def __init__(
        self,
        width: int,
        *,
        num_experts: int = 8,
        top_k: int = 2,
        hidden: int | None = None,
        num_shared: int = 0,
        shared_gate: bool = False,
        activation: str = "silu",
        router: str = "softmax_topk_renorm",
        num_groups: int = 1,
        top_groups: int = 1,
        group_score_top: int = 2,
        routed_scaling: float = 1.0,
        bias_rate: float = 0.0,
        bias_zero_mean: bool = False,
        bias_stop_step: int | None = None,
        top_k_schedule: tuple = (),
        balance_coef: float = 0.01,
        balance_scope: str = "global",
        balance_scaling: str = "megatron",
        z_coef: float = 0.0,
        top1_coef: float = 0.0,
        top1_temperature: float = 0.1,
        capacity_factor: float | None = None,
        exchange: str = "all_to_all",
        backend: str | None = None,
        init_std: float = 0.02,
        dtype=jnp.float32,
        param_dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        """`hidden` (F) is the width of one expert; None: the width. Shared experts are one ffn of width
        `num_shared` * F; `shared_gate` multiplies what they give by sigmoid(x w), a number a token
        (Qwen2-MoE). Router and losses: `experts/routers.py`, `experts/router_losses.py`; a
        coefficient of 0 turns a loss off. `capacity_factor` None: no token is dropped. `exchange`: how
        tokens travel between devices, `experts/exchange.py`. `top_k_schedule`
        ((step, experts), ...) holds before `top_k`: `experts/router_state.py`."""
        hidden = width if hidden is None else hidden
        self.losses = Losses(balance_coef, z_coef, top1_coef, top1_temperature)
        _check(hidden, num_shared, shared_gate, self.losses, capacity_factor)
        names.lookup(dict.fromkeys((None, *grouped_matmul.BACKENDS)), backend, "moe.backend")
        names.lookup(dict.fromkeys(router_losses.SCOPES), balance_scope, "moe.balance_scope")
        names.lookup(dict.fromkeys(router_losses.SCALINGS), balance_scaling, "moe.balance_scaling")
        names.lookup(dict.fromkeys(exchanges.WAYS), exchange, "moe.exchange")
        self.balance_scope, self.balance_scaling = balance_scope, balance_scaling
        self.num_experts, self.top_k, self.num_groups = num_experts, top_k, num_groups
        self.top_groups, self.capacity_factor, self.width = top_groups, capacity_factor, width
        self.exchange = exchange
        shared = dict(init_std=init_std, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.router = routers.Router(
            width,
            num_experts,
            top_k=top_k,
            kind=router,
            num_groups=num_groups,
            top_groups=top_groups,
            group_score_top=group_score_top,
            scaling=routed_scaling,
            schedule=top_k_schedule,
            updates=router_state.Updates(bias_rate, bias_zero_mean, bias_stop_step),
            init_std=init_std,
            param_dtype=param_dtype,
            rngs=rngs,
        )
        self.make_experts(hidden, dict(activation=activation, backend=backend), shared)
        self.num_shared, self.has_shared_gate = num_shared, shared_gate
        if num_shared:
            options = dict(hidden=num_shared * hidden, activation=activation)
            self.shared = glu.Glu(width, **options, **shared)
            if shared_gate:
                self.shared_gate = gated.TokenGate(
                    width, init_std=init_std, param_dtype=param_dtype, rngs=rngs
                )

    def make_experts(self, hidden: int, options: dict, shared: dict) -> None:
        """Sets `self.experts`; what a kind of experts replaces, with `routed`."""
        self.experts = gated.Experts(
            self.width, hidden, self.num_experts, top_k=self.top_k, **options, **shared
        )

    def __call__(self, x_BTD: Float[Array, "B T D"], ctx: Context):
        """Returns (y [B,T,D], aux)."""
        routing = self.router(x_BTD, ctx)
        y_BTD, aux = self.routed(x_BTD, routing, ctx)
        if self.num_shared:
            shared_BTD = self.shared(x_BTD, ctx)[0]
            if self.has_shared_gate:
                shared_BTD = self.shared_gate(x_BTD) * shared_BTD
            y_BTD = y_BTD + shared_BTD
        return y_BTD, aux | self._router_aux(routing, ctx)

    def routed(self, x_BTD: Float[Array, "B T D"], routing: routers.Routing, ctx: Context):
        """The chosen experts' weighted sum [B,T,D] and aux."""
        return self.through_experts(x_BTD, routing, ctx)

    def through_experts(self, x_BTD: Float[Array, "B T D"], routing: routers.Routing, ctx: Context):
        """`self.experts` on x: the weighted sum [B,T,D], and the measured share of dropped choices."""
        y_BTD, is_sent_BTK = exchanges.on_devices(
            self.experts.compute,
            self.experts.weights(),
            self.experts.logical(),
            x_BTD,
            routing.ids_BTK,
            routing.weights_BTK,
            ctx,
            num_experts=self.num_experts,
            capacity_factor=self.capacity_factor,
            way=self.exchange,
        )
        wanted = jnp.maximum(jnp.sum(routing.ids_BTK < self.num_experts), 1)
        return y_BTD, {"metric/dropped": 1 - jnp.sum(is_sent_BTK) / wanted}

    def _router_aux(self, routing: routers.Routing, ctx: Context) -> dict[str, Array]:
        losses, aux = self.losses, {}
        if losses.balance:
            aux["loss/router_balance"] = losses.balance * router_losses.load_balance(
                routing,
                scope=self.balance_scope,
                scaling=self.balance_scaling,
                num_shards=_num_shards(ctx),
                num_groups=self.num_groups,
            )
        if losses.z:
            aux["loss/router_z"] = losses.z * router_losses.z_loss(routing)
        if losses.top1:
            aux["loss/router_top1"] = losses.top1 * router_losses.top1_balance(
                routing, temperature=losses.top1_temperature
            )
        counts_E = jnp.sum(router_losses.expert_counts(routing), axis=0)
        aux[router_state.COUNTS] = counts_E
        router = self.router
        bias_E = router.bias[...] if router.scoring.has_bias else None
        return {
            **aux,
            **router_losses.load_metrics(counts_E),
            **router_losses.router_metrics(routing),
            **router_state.window_metrics(router.load[...], router.idle_steps[...], bias_E),
        }


def _check(hidden, num_shared, shared_gate, losses: Losses, capacity_factor) -> None:
    if hidden < 1:
        raise ValueError(f"moe.hidden={hidden} must be at least 1, or None for the model's width.")
    if num_shared < 0:
        raise ValueError(f"moe.num_shared={num_shared} must be 0 (none) or above.")
    if shared_gate and not num_shared:
        raise ValueError(
            "moe.shared_gate=True has no shared expert to gate with num_shared=0; use "
            "num_shared=1 or shared_gate=False."
        )
    for name in ("balance", "z", "top1"):
        if getattr(losses, name) < 0:
            raise ValueError(
                f"moe.{name}_coef={getattr(losses, name)} must be above 0, or 0 to turn the loss off."
            )
    if not losses.top1_temperature > 0:
        raise ValueError(
            f"moe.top1_temperature={losses.top1_temperature} must be above 0, such as 0.1."
        )
    if capacity_factor is not None and not capacity_factor > 0:
        raise ValueError(
            f"moe.capacity_factor={capacity_factor} must be above 0, or None to drop no token."
        )


def _num_shards(ctx: Context) -> int:
    """Devices that have rows of their own."""
    return 1 if ctx.layout is None else ctx.layout.parts("batch")
