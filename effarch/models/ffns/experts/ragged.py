"""Ragged all-to-all: each device sends each other one as many rows as it has for it, end to end.

With R[s, t] the rows from device s to device t, on device s: slice t is sent from sum_(u<t) R[s, u], and
lands on t at sum_(u<s) R[u, t]. The way back is that of the transposed R. Neither of XLA's two
backward passes is used: each way is the other's gradient.

Not on CPUs, where the compiler has no such collective.

Legend: S = devices along the axis, M = rows of a device's array, X = what a row holds.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from effarch.kernels import platform, varying


class Route(NamedTuple):
    """Which rows go where; the four arrays of this device, [S] each, of either way."""

    way_there: tuple[Array, Array, Array, Array]
    """First row of each slice here, its rows, its first row there, the rows that come from each."""
    way_back: tuple[Array, Array, Array, Array]
    axes: tuple[str, ...]
    num_here: int
    num_there: int
    """Rows of the arrays before and after they travelled."""

    def there(self, x_MX: Array) -> Array:
        """Rows [num_here, ...] at the devices that they are for; zeros where none came."""
        slices = (*self.way_there, *self.way_back)
        return _travel(self.axes, self.num_there, *varying.align([x_MX, *slices]))

    def back(self, x_MX: Array) -> Array:
        """Rows [num_there, ...] where they came from."""
        slices = (*self.way_back, *self.way_there)
        return _travel(self.axes, self.num_here, *varying.align([x_MX, *slices]))


def route(sizes_S: Int[Array, " S"], axes: tuple[str, ...], num_here: int, num_there: int) -> Route:
    """Of rows sorted by the device that they are for, `sizes` of each; inside a section over `axes`."""
    sizes_SS = jax.lax.all_gather(sizes_S, axes)
    return Route(*slices(sizes_SS, jax.lax.axis_index(axes)), axes, num_here, num_there)


def slices(sizes_SS: Int[Array, "S S"], own: int | Array):
    """`way_there` and `way_back` of device `own`; sizes[s, t] rows travel from s to t."""
    first_here_SS = jnp.cumsum(sizes_SS, axis=1) - sizes_SS
    first_there_SS = jnp.cumsum(sizes_SS, axis=0) - sizes_SS
    there = (first_here_SS[own], sizes_SS[own], first_there_SS[own], sizes_SS[:, own])
    back = (first_there_SS[:, own], sizes_SS[:, own], first_here_SS[:, own], sizes_SS[own])
    return there, back


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _travel(axes, num_rows, x_MX, *slices):
    empty, _ = varying.align([jnp.zeros((num_rows, *x_MX.shape[1:]), x_MX.dtype), x_MX])
    return _exchange(x_MX, empty, *slices[:4], axis_name=axes)


def _travel_fwd(axes, num_rows, x_MX, *slices):
    return _travel(axes, num_rows, x_MX, *slices), (x_MX.shape[0], slices)


def _travel_bwd(axes, num_rows, saved, g_MX):
    num_before, slices = saved
    return _travel(axes, num_before, g_MX, *slices[4:], *slices[:4]), *(None,) * len(slices)


_travel.defvjp(_travel_fwd, _travel_bwd)


def _exchange(*arguments, axis_name):
    if platform.current() == "cpu":
        raise ValueError(
            "moe.exchange='ragged' needs TPUs or GPUs: the compiler for CPUs has no ragged all-to-all; "
            "use 'all_to_all'."
        )
    return jax.lax.ragged_all_to_all(*arguments, axis_name=axis_name)
