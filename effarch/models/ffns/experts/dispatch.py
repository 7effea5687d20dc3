"""Moving tokens to the rows of their experts and back, by gathers alone.

A plan gives each choice (token n, its k-th expert) a row, rows of one expert consecutive. Dropless
plans have a row for every choice (MegaBlocks, arXiv 2211.15841); plans with a capacity have as many rows
for every expert, and choices beyond it go nowhere, last tokens first (Switch, arXiv 2101.03961).

Legend: N = tokens, M = rows; a choice is numbered n * K + k.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from effarch.kernels import varying
from effarch.kernels.grouped_matmul import api as grouped_matmul
from effarch.kernels.grouped_matmul import rows


class Plan(NamedTuple):
    """Rows and choices, each with the other's index."""

    slots_NK: Int[Array, "N K"]
    """The row of each choice; M for none."""
    choices_M: Int[Array, " M"]
    """The choice of each row; N * K for none, a row of zeros."""
    group_sizes_E: Int[Array, " E"]
    """Rows of each expert, rows of zeros included."""
    aligned: int
    """A divisor of every group size; 1 says nothing."""

    @property
    def per_choice(self) -> "Plan":
        """The same rows for tokens that stand once for each choice, [N * K, ...]."""
        return self._replace(slots_NK=self.slots_NK.reshape(-1, 1))

    @property
    def is_sent(self) -> Bool[Array, "N K"]:
        """Which choices have a row."""
        return self.slots_NK < self.choices_M.shape[0]


def dropless(ids_NK: Int[Array, "N K"], num_experts: int, aligned: int | None = None) -> Plan:
    """A row for every choice, sorted by expert; choices of expert E (none) go nowhere.

    `aligned` None: what serves `grouped_matmul` best."""
    num_choices = ids_NK.size
    aligned = aligned or grouped_matmul.alignment(num_choices, num_experts)
    num_rows = num_choices + min(num_experts, num_choices) * (aligned - 1)
    num_rows = -(-num_rows // aligned) * aligned
    position_NK, sizes_E = _positions(ids_NK, num_experts)
    sizes_E = -(-sizes_E // aligned) * aligned
    starts_E = jnp.cumsum(sizes_E) - sizes_E
    slots_NK = jnp.where(
        ids_NK < num_experts, rows.gather(starts_E, ids_NK) + position_NK, num_rows
    )
    return Plan(slots_NK, _inverse(slots_NK, num_rows), sizes_E, aligned)


def capacity(ids_NK: Int[Array, "N K"], num_experts: int, factor: float) -> int:
    """ceil(factor * N * K / E) rows an expert; nothing can be dropped from factor = E / K on."""
    return min(math.ceil(factor * ids_NK.size / num_experts), ids_NK.shape[0])


def within(ids_NK: Int[Array, "N K"], num_experts: int, num: int) -> Bool[Array, "N K"]:
    """Which choices are among the first `num` of their expert, in the order of tokens."""
    return (ids_NK < num_experts) & (_positions(ids_NK, num_experts)[0] < num)


def fixed(ids_NK: Int[Array, "N K"], num_experts: int, num: int) -> Plan:
    """`num` rows for every expert; choices beyond them go nowhere."""
    num_rows = num_experts * num
    position_NK, _ = _positions(ids_NK, num_experts)
    fits_NK = (ids_NK < num_experts) & (position_NK < num)
    slots_NK = jnp.where(fits_NK, ids_NK * num + position_NK, num_rows)
    sizes_E = jnp.full((num_experts,), num, jnp.int32)
    return Plan(slots_NK, _inverse(slots_NK, num_rows), sizes_E, num)


def _positions(ids_NK, num_experts: int):
    """How many earlier choices have the same expert, [N,K], and the choices of each expert, [E]."""
    ids = ids_NK.reshape(-1).astype(jnp.int32)
    order = _order(ids, num_experts)
    bounds = jnp.searchsorted(ids[order], jnp.arange(num_experts + 1)).astype(jnp.int32)
    rank = jnp.zeros_like(order).at[order].set(jnp.arange(ids.size), unique_indices=True)
    position = rank - bounds[ids]
    return position.reshape(ids_NK.shape), bounds[1:] - bounds[:-1]


def _order(ids, num_experts: int):
    """A stable argsort. Numbers that hold expert and choice sort in a third of the time, if they fit."""
    if (num_experts + 1) * ids.size >= 2**31:
        return jnp.argsort(ids, stable=True)
    return jnp.sort(ids * ids.size + jnp.arange(ids.size)) % ids.size


def _inverse(slots_NK, num_rows: int):
    empty = jnp.full((num_rows,), slots_NK.size, jnp.int32)
    choices = jnp.arange(slots_NK.size, dtype=jnp.int32)
    return empty.at[slots_NK.reshape(-1)].set(choices, mode="drop", unique_indices=True)


def send(x_ND: Float[Array, "N D"], plan: Plan) -> Float[Array, "M D"]:
    """The rows of the experts: copies of their tokens, zeros where a row is empty."""
    return _send(*varying.align([x_ND, plan.slots_NK, plan.choices_M]))


def collect(
    y_MD: Float[Array, "M D"], weights_NK: Float[Array, "N K"], plan: Plan
) -> Float[Array, "N D"]:
    """y_n = sum_k w_(n,k) y[row of (n, k)], summed in float32, in y's dtype."""
    return _collect(*varying.align([y_MD, weights_NK, plan.slots_NK, plan.choices_M]))


@jax.custom_vjp
def _send(x_ND, slots_NK, choices_M):
    return rows.gather(x_ND, choices_M // slots_NK.shape[1])


def _send_fwd(x_ND, slots_NK, choices_M):
    return _send(x_ND, slots_NK, choices_M), slots_NK


def _send_bwd(slots_NK, g_MD):
    dx_ND = _sum_of_choices(g_MD, None, slots_NK)
    return dx_ND.astype(g_MD.dtype), None, None


_send.defvjp(_send_fwd, _send_bwd)


@jax.custom_vjp
def _collect(y_MD, weights_NK, slots_NK, choices_M):
    del choices_M
    return _sum_of_choices(y_MD, weights_NK, slots_NK).astype(y_MD.dtype)


def _collect_fwd(y_MD, weights_NK, slots_NK, choices_M):
    saved = (y_MD, weights_NK, slots_NK, choices_M)
    return _collect(*saved), saved


def _collect_bwd(saved, g_ND):
    y_MD, weights_NK, slots_NK, choices_M = saved
    g_ND = g_ND.astype(jnp.float32)
    of_rows_M1 = rows.gather(weights_NK.reshape(-1), choices_M)[:, None]
    dy_MD = of_rows_M1 * rows.gather(g_ND, choices_M // slots_NK.shape[1])
    ones_D = jnp.ones(g_ND.shape[1:])  # a product: CPUs add up rows one number after the other
    products = [
        jnp.dot(
            rows.gather(y_MD, slots_N).astype(jnp.float32) * g_ND,
            ones_D,
            precision=jax.lax.Precision.HIGHEST,
        )
        for slots_N in slots_NK.T
    ]
    dweights_NK = jnp.stack(products, axis=-1).astype(weights_NK.dtype)
    return dy_MD.astype(y_MD.dtype), dweights_NK, None, None


_collect.defvjp(_collect_fwd, _collect_bwd)


def _sum_of_choices(y_MD, weights_NK, slots_NK):
    """sum_k w y[slot], one choice after the other: no [N,K,D] array is held."""
    total = 0.0
    for k in range(slots_NK.shape[1]):
        part = rows.gather(y_MD, slots_NK[:, k]).astype(jnp.float32)
        total += part if weights_NK is None else weights_NK[:, k, None] * part
    return total
