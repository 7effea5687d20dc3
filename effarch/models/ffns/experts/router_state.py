"""What a router remembers between steps: its selection bias, who was used, and the step.

Loss-free balancing, arXiv 2408.15664: after each step b_e += rate * sign(mean(n) - n_e), n_e the tokens
that expert e got in the whole step; `zero_mean` takes the mean off the signs first (Ling 2.0). No
optimizer sees b, checkpoints keep it.

Progressive sparsification, Sigma-MoE-Tiny, arXiv 2512.16248: a schedule ((100, 4), (200, 2)) chooses 4
experts a token before step 100, 2 before step 200, and the router's top_k from there on. Parameters are
the same throughout.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from effarch.models import state as state_lib

COUNTS = "count/expert_tokens"
"""The aux entry with the tokens of each expert, [E]."""
WINDOW_STEPS = 100
"""Steps over which the load is averaged (exponentially)."""


class Updates(NamedTuple):
    """How the bias moves a step; it rests from step `stop_step` on."""

    rate: float = 0.0
    zero_mean: bool = False
    stop_step: int | None = None


def load_variables(num_experts: int):
    """The load [E] (shares of the choices), steps since each expert got a token [E], steps []."""
    one = dict(logical=("router",))
    load = state_lib.ModelState(jnp.full((num_experts,), 1 / num_experts), **one)
    idle = state_lib.ModelState(jnp.zeros((num_experts,), jnp.int32), **one)
    return load, idle, state_lib.ModelState(jnp.zeros((), jnp.int32), logical=())


def bias_variable(num_experts: int) -> state_lib.CountedState:
    """The selection bias [E], float32."""
    return state_lib.CountedState(jnp.zeros((num_experts,)), logical=("router",))


def advance(state: dict, counts_YE: Float[Array, "Y E"], updates: Updates) -> dict:
    """The state after a step in which expert e of layer y got `counts_YE[y, e]` tokens."""
    steps_Y1 = state["steps"][..., None]
    share_YE = counts_YE / jnp.maximum(jnp.sum(counts_YE, axis=-1, keepdims=True), 1)
    rate_Y1 = jnp.maximum(1 / WINDOW_STEPS, 1 / (steps_Y1 + 1))  # a plain mean until it is full
    new = {
        "load": state["load"] + rate_Y1 * (share_YE - state["load"]),
        "idle_steps": jnp.where(counts_YE > 0, 0, state["idle_steps"] + 1),
        "steps": state["steps"] + 1,
    }
    if "bias" in state:
        step_YE = bias_step(counts_YE, updates)
        if updates.stop_step is not None:
            step_YE = jnp.where(steps_Y1 < updates.stop_step, step_YE, 0.0)
        new["bias"] = state["bias"] + step_YE
    return new


def bias_step(counts_YE: Float[Array, "Y E"], updates: Updates) -> Float[Array, "Y E"]:
    """rate * sign(mean(n) - n_e), with zero mean if asked for."""
    sign_YE = jnp.sign(jnp.mean(counts_YE, axis=-1, keepdims=True) - counts_YE)
    if updates.zero_mean:
        sign_YE -= jnp.mean(sign_YE, axis=-1, keepdims=True)
    return updates.rate * sign_YE


def check_schedule(schedule: tuple, num_experts: int) -> None:
    """Pairs (step, top_k), steps increasing, top_k from 1 to E."""
    fits = all(
        isinstance(pair, tuple) and len(pair) == 2 and all(isinstance(n, int) for n in pair)
        for pair in schedule
    )
    steps = [pair[0] for pair in schedule] if fits else []
    increasing = all(a < b for a, b in zip([0, *steps], steps))
    if not fits or not increasing or any(not 1 <= k <= num_experts for _, k in schedule):
        raise ValueError(
            f"moe.top_k_schedule={schedule!r} must be pairs (step, experts) with increasing steps "
            f"above 0 and from 1 to {num_experts} experts, such as ((100, 4), (200, 2))."
        )


def window_metrics(load_E: Float[Array, " E"], idle_E, bias_E: Array | None) -> dict[str, Array]:
    """From the state: imbalance over the window, unused and dead experts (shares), the largest |b|."""
    metrics = {
        "metric/max_vio_window": jnp.max(load_E) * load_E.size - 1,
        "metric/unused_experts": jnp.mean(idle_E >= WINDOW_STEPS, dtype=jnp.float32),
        "metric/dead_experts": jnp.mean(idle_E >= 10 * WINDOW_STEPS, dtype=jnp.float32),
    }
    if bias_E is not None:
        metrics["metric/router_bias_max"] = jnp.max(jnp.abs(bias_E))
    return metrics
