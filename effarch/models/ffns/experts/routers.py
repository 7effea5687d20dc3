"""Routers: which experts a token goes to, and with what weight.

    z = x W (float32)    s = score(z)    chosen = top-K of s + b    w = s[chosen], normalized or not

Kinds (scores; bias b; weights): Mixtral, arXiv 2401.04088, and Qwen3 (softmax, none, sum to 1); OLMoE,
arXiv 2409.02060 (softmax, none, as they are); DeepSeek-V3, arXiv 2412.19437, and Ling 2.0, arXiv
2510.22115 (sigmoid, b, sum to 1), where b decides who is chosen and never enters the weights.
Group-limited choice: experts form groups, only the best `top_groups` groups (by the sum of their best
scores) are looked at.

Legend: G = groups of experts.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from effarch import names
from effarch.models.context import Context
from effarch.models.ffns.experts import router_state


class Scoring(NamedTuple):
    """How logits become scores, whether the chosen ones are made to sum to 1, whether b exists."""

    score: Callable[[Array], Array]
    normalized: bool
    has_bias: bool


def _sqrt_softplus(z):
    return jnp.sqrt(jax.nn.softplus(z))


KINDS = {
    "softmax_topk_renorm": Scoring(jax.nn.softmax, True, False),
    "topk_softmax": Scoring(jax.nn.softmax, True, False),  # of the chosen logits: the same numbers
    "softmax_topk": Scoring(jax.nn.softmax, False, False),
    "sigmoid_bias": Scoring(jax.nn.sigmoid, True, True),
    "sqrtsoftplus": Scoring(_sqrt_softplus, True, True),
}


class Routing(NamedTuple):
    """Where tokens go. A choice that goes nowhere (padding, schedule) has expert E and weight 0."""

    ids_BTK: Int[Array, "B T K"]
    weights_BTK: Float[Array, "B T K"]
    logits_BTE: Float[Array, "B T E"]
    probs_BTE: Float[Array, "B T E"]
    """Scores that sum to 1, for the losses (raw sigmoid scores where one expert is chosen)."""
    valid_BT: Bool[Array, "B T"]


class Router(nnx.Module):
    """x [B,T,D] -> Routing.  D*E parameters (+ E of b), 2*D*E FLOPs per token; all in float32."""

    def __init__(
        self,
        width: int,
        num_experts: int,
        *,
        top_k: int,
        kind: str = "softmax_topk_renorm",
        num_groups: int = 1,
        top_groups: int = 1,
        group_score_top: int = 2,
        scaling: float = 1.0,
        schedule: tuple = (),
        updates: router_state.Updates | None = None,
        init_std: float = 0.02,
        param_dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        scoring = names.lookup(KINDS, kind, "moe.router")
        updates = updates or router_state.Updates()
        _check(num_experts, top_k, kind, num_groups, top_groups, group_score_top, updates)
        router_state.check_schedule(schedule, num_experts)
        _check_schedule(schedule, top_k, scoring, top_groups * num_experts // num_groups)
        self.sizes = (width, num_experts)
        self.top_k, self.schedule, self.scoring = top_k, schedule, scoring
        self.num_groups, self.top_groups = num_groups, top_groups
        self.group_score_top, self.scaling = group_score_top, scaling
        self.updates = updates
        self.kernel = nnx.Param(
            _initial(self.sizes, scoring, init_std, param_dtype, rngs), logical=("embed", "router")
        )
        self.load, self.idle_steps, self.steps = router_state.load_variables(num_experts)
        if scoring.has_bias:
            self.bias = router_state.bias_variable(num_experts)

    def __call__(self, x_BTD: Float[Array, "B T D"], ctx: Context) -> Routing:
        z_BTE = jnp.einsum(
            "btd,de->bte",
            x_BTD.astype(jnp.float32),
            self.kernel[...].astype(jnp.float32),
            precision=jax.lax.Precision.HIGHEST,
        )
        scores_BTE = self.scoring.score(z_BTE)
        ids_BTK = self._choose(jax.lax.stop_gradient(scores_BTE))
        weights_BTK = jnp.take_along_axis(scores_BTE, ids_BTK, axis=-1)
        valid_BT = jnp.ones(z_BTE.shape[:2], bool)
        if ctx.segment_ids is not None:
            valid_BT = ctx.segment_ids != 0
        active_BTK = valid_BT[..., None] & (jnp.arange(ids_BTK.shape[-1]) < self._top_k_now())
        weights_BTK = jnp.where(active_BTK, weights_BTK, 0.0)
        if self.scoring.normalized and self.top_k > 1:
            weights_BTK /= jnp.sum(weights_BTK, axis=-1, keepdims=True) + 1e-20
        probs_BTE = scores_BTE
        if self.scoring.score is not jax.nn.softmax and self.top_k > 1:
            probs_BTE = scores_BTE / (jnp.sum(scores_BTE, axis=-1, keepdims=True) + 1e-20)
        return Routing(
            jnp.where(active_BTK, ids_BTK, self.sizes[1]),
            weights_BTK * self.scaling,
            z_BTE,
            probs_BTE,
            valid_BT,
        )

    def _choose(self, scores_BTE):
        """The chosen experts [B,T,K], best first; K is the largest of the schedule."""
        if self.scoring.has_bias:
            scores_BTE = scores_BTE + self.bias[...]
        if self.num_groups > 1:
            scores_BTE = self._within_best_groups(scores_BTE)
        most = max(self.top_k, *(k for _, k in self.schedule), 1)
        return jax.lax.top_k(scores_BTE, most)[1]

    def _within_best_groups(self, scores_BTE):
        grouped = rearrange(scores_BTE, "b t (g e) -> b t g e", g=self.num_groups)
        of_groups = jnp.sum(jax.lax.top_k(grouped, self.group_score_top)[0], axis=-1)
        best = jax.lax.top_k(of_groups, self.top_groups)[1]
        keep = jnp.any(best[..., None] == jnp.arange(self.num_groups), axis=-2)
        return jnp.where(keep[..., None], grouped, -jnp.inf).reshape(scores_BTE.shape)

    def _top_k_now(self):
        """Experts a token in the current step: the schedule's, then `top_k`."""
        now = jnp.asarray(self.top_k)
        for until, top_k in reversed(self.schedule):
            now = jnp.where(self.steps[...] < until, top_k, now)
        return now

    def next_state(self, state: dict, aux: dict, probes: dict) -> dict:
        """The bias and the load after a step; see `router_state.advance`."""
        del probes
        return router_state.advance(state, aux[router_state.COUNTS], self.updates)

    def forward_flops(self, seq_len: int) -> float:
        """Per token; the sequence length does not matter."""
        return 2.0 * self.sizes[0] * self.sizes[1]


def _initial(sizes, scoring: Scoring, init_std: float, param_dtype, rngs: nnx.Rngs):
    """N(0, init_std) for softmax; uniform in +-1/sqrt(D) for the others, as Ling 2.0 does."""
    if scoring.score is jax.nn.softmax:
        return init_std * jax.random.normal(rngs.params(), sizes, param_dtype)
    bound = sizes[0] ** -0.5
    return jax.random.uniform(rngs.params(), sizes, param_dtype, -bound, bound)


def _check(num_experts, top_k, kind, num_groups, top_groups, group_score_top, updates) -> None:
    if not 1 <= top_k <= num_experts:
        raise ValueError(f"moe.top_k={top_k} must be from 1 to num_experts={num_experts}.")
    if top_k == 1 and kind in ("softmax_topk_renorm", "topk_softmax"):
        raise ValueError(
            f"moe.router={kind!r} with top_k=1 gives every choice the weight 1 and the router no "
            "gradient; use router='softmax_topk', or a larger top_k."
        )
    if updates.rate and not KINDS[kind].has_bias:
        biased = ", ".join(name for name, scoring in KINDS.items() if scoring.has_bias)
        raise ValueError(
            f"moe.bias_rate={updates.rate} needs a router with a bias, and router={kind!r} has none; "
            f"use one of {biased}, or bias_rate=0."
        )
    if updates.rate < 0 or (updates.stop_step or 0) < 0:
        raise ValueError(
            f"moe.bias_rate={updates.rate} and moe.bias_stop_step={updates.stop_step} must be 0 or "
            "above; bias_stop_step=None goes on to the end."
        )
    if num_groups < 1 or num_experts % num_groups:
        raise ValueError(
            f"moe.num_groups={num_groups} does not divide num_experts={num_experts}; use a divisor."
        )
    size = num_experts // num_groups
    if not 1 <= top_groups <= num_groups or top_k > top_groups * size:
        raise ValueError(
            f"moe.top_groups={top_groups} of {num_groups} groups of {size} experts cannot give "
            f"top_k={top_k} experts; use from {-(-top_k // size)} to {num_groups}."
        )
    if num_groups > 1 and not 1 <= group_score_top <= size:
        raise ValueError(
            f"moe.group_score_top={group_score_top} must be from 1 to the {size} experts of a group."
        )


def _check_schedule(schedule, top_k, scoring: Scoring, reach: int) -> None:
    """Each phase's number of experts against the groups in reach and the rule for one expert."""
    for _, now in schedule:
        if now > reach:
            raise ValueError(
                f"moe.top_k_schedule={schedule!r} chooses {now} experts, and the best groups hold "
                f"{reach}; use at most {reach}, or more top_groups."
            )
        if now == 1 and top_k > 1 and scoring.normalized:
            raise ValueError(
                f"moe.top_k_schedule={schedule!r} has a phase of one expert, whose weight would be 1 "
                "and give the router no gradient; use router='softmax_topk', or at least 2 experts."
            )
