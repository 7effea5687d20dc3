"""Losses on a router's choices, and what is measured of them.

    balance   E sum_e f_e P_e,  f_e = n_e / sum(n),  P_e = mean_t p_(t,e)   (Switch, arXiv 2101.03961)
    z         mean_t logsumexp_e(z_(t,e))^2                                (ST-MoE, arXiv 2202.08906)
    top-1     E sum_e P_e^2 / mean_t max_e p_(t,e),  p = softmax(z / tau)  (Sigma-MoE, arXiv 2512.16248)

Sums run over tokens that are not padding. n_e is a count and carries no gradient. All are 1 at balance
(z aside) in the scaling of Megatron and MegaBlocks; that of Hugging Face divides n_e by the number of
tokens instead, so that its value and its coefficient differ by the factor K.

Legend: P = parts of the batch that are balanced each for itself; X = groups of experts.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from effarch.models.ffns.experts.routers import Routing

SCOPES = ("global", "local", "sequence", "expert_group")
SCALINGS = ("megatron", "hf")


def expert_counts(routing: Routing) -> Float[Array, "B E"]:
    """How many tokens of each row went to each expert."""
    num_experts = routing.logits_BTE.shape[-1]
    hits_BTKE = routing.ids_BTK[..., None] == jnp.arange(num_experts)
    return jnp.sum(hits_BTKE, axis=(1, 2), dtype=jnp.float32)


def load_balance(
    routing: Routing,
    *,
    scope: str = "global",
    scaling: str = "megatron",
    num_shards: int = 1,
    num_groups: int = 1,
) -> Float[Array, ""]:
    """E sum_e f_e P_e, averaged over the parts that `scope` names.

    global: the whole batch (arXiv 2501.11873). local: the rows of each of `num_shards` devices.
    sequence: each row (DeepSeek-V3). expert_group: the whole batch, f and P summed over the experts of
    each of `num_groups` groups: devices are balanced, their experts are not (Pangu Ultra MoE).
    """
    counts_PE = expert_counts(routing)
    mass_PE = jnp.sum(jnp.where(routing.valid_BT[..., None], routing.probs_BTE, 0.0), axis=1)
    tokens_P1 = jnp.sum(routing.valid_BT, axis=1, dtype=jnp.float32)[:, None]
    if scope != "sequence":
        parts = num_shards if scope == "local" else 1
        counts_PE, mass_PE, tokens_P1 = (
            jnp.sum(x.reshape(parts, -1, x.shape[-1]), axis=1)
            for x in (counts_PE, mass_PE, tokens_P1)
        )
    chosen_P1 = jnp.sum(counts_PE, axis=-1, keepdims=True)
    f_PE = counts_PE / jnp.maximum(tokens_P1 if scaling == "hf" else chosen_P1, 1)
    p_PE = mass_PE / jnp.maximum(tokens_P1, 1)
    if scope == "expert_group":
        f_PE, p_PE = (jnp.sum(x.reshape(x.shape[0], num_groups, -1), axis=-1) for x in (f_PE, p_PE))
    loss_P = f_PE.shape[-1] * jnp.sum(jax.lax.stop_gradient(f_PE) * p_PE, axis=-1)
    used_P = tokens_P1[:, 0] > 0
    return jnp.sum(jnp.where(used_P, loss_P, 0.0)) / jnp.maximum(jnp.sum(used_P), 1)


def z_loss(routing: Routing) -> Float[Array, ""]:
    """Mean over tokens of logsumexp(z)^2."""
    return _mean(jax.nn.logsumexp(routing.logits_BTE, axis=-1) ** 2, routing)


def top1_balance(routing: Routing, *, temperature: float = 0.1) -> Float[Array, ""]:
    """E sum_e P_e^2 / mean_t max_e p_(t,e): at least 1, and 1 only for one-hot, evenly used p."""
    p_BTE = jax.nn.softmax(routing.logits_BTE / temperature, axis=-1)
    mass_E = jnp.sum(jnp.where(routing.valid_BT[..., None], p_BTE, 0.0), axis=(0, 1))
    mean_E = mass_E / jnp.maximum(jnp.sum(routing.valid_BT), 1)
    return mean_E.size * jnp.sum(mean_E**2) / _mean(jnp.max(p_BTE, axis=-1), routing)


def load_metrics(counts_E: Float[Array, " E"]) -> dict[str, Array]:
    """Imbalance of one batch: entropy in [0, 1], max and min load against the mean."""
    share_E = counts_E / jnp.maximum(jnp.sum(counts_E), 1)
    entropy = -jnp.sum(jax.scipy.special.xlogy(share_E, share_E)) / jnp.log(counts_E.size)
    max_vio = jnp.max(share_E) * counts_E.size - 1
    return {
        "metric/load_entropy": entropy,
        "metric/max_vio": max_vio,
        "metric/max_vio_max": max_vio,
        "metric/min_load": jnp.min(share_E) * counts_E.size,
    }


def router_metrics(routing: Routing) -> dict[str, Array]:
    """Mean entropy of p in [0, 1] and mean largest p."""
    p_BTE = routing.probs_BTE
    entropy_BT = -jnp.sum(jax.scipy.special.xlogy(p_BTE, p_BTE), axis=-1)
    return {
        "metric/router_entropy": _mean(entropy_BT, routing) / jnp.log(p_BTE.shape[-1]),
        "metric/router_confidence": _mean(jnp.max(p_BTE, axis=-1), routing),
    }


def _mean(x_BT: Float[Array, "B T"], routing: Routing) -> Float[Array, ""]:
    total = jnp.sum(jnp.where(routing.valid_BT, x_BT, 0.0))
    return total / jnp.maximum(jnp.sum(routing.valid_BT), 1)
