"""The device mesh: five axes, given by name, all of type Auto."""

import math
from collections.abc import Mapping, Sequence

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

AXES = ("data", "fsdp", "expert", "context", "tensor")
"""Replicas; parameter shards; experts; pieces of the sequence; pieces of heads and channels."""
BATCH_AXES = ("data", "fsdp", "expert")


def resolve(sizes: Mapping[str, int], num_devices: int) -> dict[str, int]:
    """The size of each axis; at most one may be -1, which takes the devices that are left.

    Raises ValueError, naming the field, if the sizes do not make `num_devices`.
    """
    shape = {axis: int(sizes[axis]) for axis in AXES}
    for axis, size in shape.items():
        if size < 1 and size != -1:
            raise ValueError(f"mesh.{axis}={size} must be a positive number, or -1 for the rest.")
    free = [axis for axis, size in shape.items() if size == -1]
    if len(free) > 1:
        raise ValueError(f"mesh.{free[1]}=-1, but mesh.{free[0]} is -1 already; give one of them.")
    fixed = math.prod(size for size in shape.values() if size != -1)
    if free and num_devices % fixed == 0:
        shape[free[0]] = num_devices // fixed
    if math.prod(shape.values()) != num_devices:
        asked = " x ".join(f"{axis} {size}" for axis, size in shape.items() if size != 1) or "one"
        raise ValueError(
            f"mesh: {asked} does not fit {num_devices} device(s); make the product of the axes "
            f"{num_devices}, or set one axis to -1."
        )
    return shape


def make(shape: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh of the given shape over the devices (default: all of them).

    An axis may take a part of a TPU's physical axis: 8 of 4 x 4 x 4.
    """
    sizes = tuple(shape[axis] for axis in AXES)
    devices = jax.devices() if devices is None else devices
    placed = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    return Mesh(placed, AXES, axis_types=(AxisType.Auto,) * len(AXES))
