"""Expert parallelism: rows travel to the device that holds their expert, and back.

Each device sends, in buffers of equal size, a copy of a token for every choice to the device of the
chosen expert (padded all-to-all; dropless if the buffers hold all that can come), sorts what it got by
its own experts, computes, and returns the rows to where they came from: GShard, arXiv 2006.16668.
Runs inside the section that `Context.local` opens; on one device nothing travels.

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
from effarch.models.ffns.experts import dispatch

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
            ids_NK = jnp.where(
                dispatch.within(ids_NK, self.num_experts, capacity), ids_NK, self.num_experts
            )
            most = min(most, num_local * capacity)
        there = dispatch.fixed(ids_NK // num_local, self.num_shards, most)
        own_M = jnp.where(
            there.choices_M < ids_NK.size,
            rows.gather(ids_NK.reshape(-1), there.choices_M) % num_local,
            num_local,
        )
        x_MX, own_M = self._swap(_send(x_NX, there, ids_NK)), self._swap(own_M)
        here = dispatch.dropless(own_M[:, None], num_local)
        y_MX = apply(dispatch.send(x_MX, here), here)
        ones_M1 = jnp.ones(own_M[:, None].shape, jnp.float32)
        return self._swap(dispatch.collect(y_MX, ones_M1, here)), there

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
) -> tuple[Float[Array, "B T D"], Bool[Array, "B T K"]]:
    """The weighted sum over the chosen experts, each device with its own tokens and experts.

    `compute(weights, x_ND, ids_NK, weights_NK, exchange)` returns the sum and the plan; `logical` are
    the axes by which the section sees the weights. Returns the sum and which choices had a row.
    """
    exchange = _exchange(ctx, num_experts, capacity_factor)
    kept = list(weights)

    def on_pieces(x_BTD, ids_BTK, weights_BTK, *arrays):
        x_ND, ids_NK, weights_NK = (
            x.reshape(-1, x.shape[-1]) for x in (x_BTD, ids_BTK, weights_BTK)
        )
        y_ND, plan = compute(dict(zip(kept, arrays)), x_ND, ids_NK, weights_NK, exchange)
        return exchange.total(y_ND).reshape(x_BTD.shape), plan.is_sent.reshape(ids_BTK.shape)

    arrays = [x_BTD, ids_BTK, weights_BTK, *(weights[name] for name in kept)]
    inputs = [TOKENS, TOKENS, TOKENS, *(logical[name] for name in kept)]
    return ctx.local(on_pieces, arrays, inputs, (TOKENS, TOKENS))


def _exchange(ctx: Context, num_experts: int, capacity_factor: float | None) -> Exchange:
    layout = ctx.layout
    if layout is None or layout.mesh.size == 1:
        return Exchange(num_experts, capacity_factor)
    (expert_axes,), (sum_axes,) = layout.mesh_axes(("experts",)), layout.mesh_axes(("ffn",))
    num_shards = math.prod(layout.mesh.shape[axis] for axis in expert_axes)
    return Exchange(num_experts, capacity_factor, expert_axes, num_shards, sum_axes)
