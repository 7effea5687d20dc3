"""Expert parallelism: rows travel to the device that holds their expert, and back.

all_to_all  each device sends, in buffers of equal size, a copy of a token for every choice to the device
            of the chosen expert (dropless if the buffers hold all that can come), sorts what it got by
            its own experts, computes, and returns the rows to where they came from: GShard, arXiv
            2006.16668
ragged      the same with the rows that there are, laid end to end (`ragged.py`); TPUs and GPUs
ring        every device gets all tokens of all, computes those of its own experts, and the sums are
            added up where the tokens came from: fewer bytes than padded buffers where a device holds
            several experts, than ragged ones from about K = S choices on

Runs inside the section that `Context.local` opens; on one device nothing travels. What each way sends is
counted in `traffic.py`.

Legend: S = devices along the expert axis, C = rows from one device to another, N = tokens of a device,
X = what a row holds.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from effarch.kernels.grouped_matmul import rows
from effarch.models.context import Context
from effarch.models.ffns.experts import dispatch, ragged

WAYS = ("all_to_all", "ragged", "ring")
TOKENS = ("batch", "time", None)


class Exchange(NamedTuple):
    """How rows meet their experts inside a local section."""

    num_experts: int
    capacity_factor: float | None = None
    expert_axes: tuple[str, ...] = ()
    """Mesh axes over which experts are spread, if more than one device is along them."""
    num_shards: int = 1
    sum_axes: tuple[str, ...] = ()
    """Mesh axes over which the experts' hidden channels are spread: partial sums are added."""
    way: str = WAYS[0]

    def combined(
        self,
        apply: Callable[[Array, dispatch.Plan], Array],
        x_ND: Float[Array, "N D"],
        ids_NK: Int[Array, "N K"],
        weights_NK: Float[Array, "N K"],
    ) -> tuple[Float[Array, "N D"], Bool[Array, "N K"]]:
        """The weighted sum of each token's experts and which choices had a row; `apply` as in `run`."""
        if self.way != "ring" or self.num_shards == 1:
            y_MD, plan = self.run(apply, x_ND, ids_NK)
            return dispatch.collect(y_MD, weights_NK, plan), plan.is_sent
        num_local = self.num_experts // self.num_shards
        ids_NK = self._within_capacity(ids_NK)
        x_AD, ids_AK, weights_AK = (
            jax.lax.all_gather(x, self.expert_axes, tiled=True) for x in (x_ND, ids_NK, weights_NK)
        )  # A: the tokens of all devices along the axis
        own_AK = ids_AK - num_local * jax.lax.axis_index(self.expert_axes)
        own_AK = jnp.where((own_AK >= 0) & (own_AK < num_local), own_AK, num_local)
        plan = dispatch.dropless(own_AK, num_local)
        y_AD = dispatch.collect(apply(dispatch.send(x_AD, plan), plan), weights_AK, plan)
        y_ND = jax.lax.psum_scatter(y_AD, self.expert_axes, tiled=True)
        return y_ND, ids_NK < self.num_experts

    def run(
        self,
        apply: Callable[[Array, dispatch.Plan], Array],
        x_NX: Float[Array, "N X"],
        ids_NK: Int[Array, "N K"],
    ) -> tuple[Float[Array, "M X"], dispatch.Plan]:
        """The experts' outputs and the plan of their rows; `apply(rows, plan)` are the experts here.

        x has a row for each token, or one for each choice.
        """
        if self.num_shards == 1:
            plan = self._plan(ids_NK)
            return apply(_send(x_NX, plan, ids_NK), plan), plan
        num_local = self.num_experts // self.num_shards
        most = ids_NK.shape[0] * min(ids_NK.shape[1], num_local)
        if self.capacity_factor is not None:
            capacity = dispatch.capacity(ids_NK, self.num_experts, self.capacity_factor)
            most = min(most, num_local * capacity)
        ids_NK = self._within_capacity(ids_NK)
        shards_NK = ids_NK // num_local
        if self.way == "ragged":
            there = dispatch.dropless(shards_NK, self.num_shards, aligned=1)
            num_rows = there.choices_M.shape[0], self.num_shards * most
            route = ragged.route(there.group_sizes_E, self.expert_axes, *num_rows)
            swap, swap_back = route.there, route.back
        else:
            there = dispatch.fixed(shards_NK, self.num_shards, most)
            swap = swap_back = self._swap
        # A row's expert there, counted from 1; rows that hold nothing arrive as 0.
        own_M = jnp.where(
            there.choices_M < ids_NK.size,
            rows.gather(ids_NK.reshape(-1), there.choices_M) % num_local + 1,
            0,
        )
        x_MX, own_M = swap(_send(x_NX, there, ids_NK)), swap(own_M)
        own_M = jnp.where(own_M > 0, own_M - 1, num_local)
        here = dispatch.dropless(own_M[:, None], num_local)
        y_MX = apply(dispatch.send(x_MX, here), here)
        ones_M1 = jnp.ones(own_M[:, None].shape, jnp.float32)
        return swap_back(dispatch.collect(y_MX, ones_M1, here)), there

    def _within_capacity(self, ids_NK):
        """The choices, those beyond a device's capacity for their expert as none."""
        if self.capacity_factor is None:
            return ids_NK
        capacity = dispatch.capacity(ids_NK, self.num_experts, self.capacity_factor)
        return jnp.where(
            dispatch.within(ids_NK, self.num_experts, capacity), ids_NK, self.num_experts
        )

    def _plan(self, ids_NK) -> dispatch.Plan:
        if self.capacity_factor is None:
            return dispatch.dropless(ids_NK, self.num_experts)
        capacity = dispatch.capacity(ids_NK, self.num_experts, self.capacity_factor)
        return dispatch.fixed(ids_NK, self.num_experts, capacity)

    def _swap(self, x_MX):
        """The rows [S * C, ...] for each device against those from each device."""
        return jax.lax.all_to_all(x_MX, self.expert_axes, 0, 0, tiled=True)

    def total(self, y_NX: Float[Array, "N X"]) -> Float[Array, "N X"]:
        """The sum over devices that hold different hidden channels."""
        return jax.lax.psum(y_NX, self.sum_axes) if self.sum_axes else y_NX


def _send(x_NX, plan: dispatch.Plan, ids_NK):
    return dispatch.send(x_NX, plan if x_NX.shape[0] == ids_NK.shape[0] else plan.per_choice)


def on_devices(
    compute: Callable,
    weights: dict[str, Array],
    logical: dict[str, Sequence[str | None]],
    x_BTD: Float[Array, "B T D"],
    ids_BTK: Int[Array, "B T K"],
    weights_BTK: Float[Array, "B T K"],
    ctx: Context,
    *,
    num_experts: int,
    capacity_factor: float | None,
    way: str = WAYS[0],
) -> tuple[Float[Array, "B T D"], Bool[Array, "B T K"]]:
    """The weighted sum over the chosen experts, each device with its own tokens and experts.

    `compute(weights, x_ND, ids_NK, weights_NK, exchange)` returns the sum and which choices had a row;
    `logical` are the axes by which the section sees the weights. Returns what `compute` does.
    """
    exchange = _exchange(ctx, num_experts, capacity_factor, way)
    kept = list(weights)

    def on_pieces(x_BTD, ids_BTK, weights_BTK, *arrays):
        x_ND, ids_NK, weights_NK = (
            x.reshape(-1, x.shape[-1]) for x in (x_BTD, ids_BTK, weights_BTK)
        )
        y_ND, is_sent_NK = compute(dict(zip(kept, arrays)), x_ND, ids_NK, weights_NK, exchange)
        return exchange.total(y_ND).reshape(x_BTD.shape), is_sent_NK.reshape(ids_BTK.shape)

    arrays = [x_BTD, ids_BTK, weights_BTK, *(weights[name] for name in kept)]
    inputs = [TOKENS, TOKENS, TOKENS, *(logical[name] for name in kept)]
    return ctx.local(on_pieces, arrays, inputs, (TOKENS, TOKENS))


def _exchange(ctx: Context, num_experts: int, capacity_factor, way: str) -> Exchange:
    layout = ctx.layout
    if layout is None or layout.mesh.size == 1:
        return Exchange(num_experts, capacity_factor)
    (expert_axes,), (sum_axes,) = layout.mesh_axes(("experts",)), layout.mesh_axes(("ffn",))
    num_shards = math.prod(layout.mesh.shape[axis] for axis in expert_axes)
    return Exchange(num_experts, capacity_factor, expert_axes, num_shards, sum_axes, way)
