"""Mesh sizes and the rules table."""

import jax
import pytest
from jax.sharding import PartitionSpec

from effarch.parallel import mesh, sharding

ONE = dict.fromkeys(mesh.AXES, 1)


def test_minus_one_takes_the_devices_that_are_left():
    assert mesh.resolve({**ONE, "fsdp": -1, "tensor": 2}, 8) == {**ONE, "fsdp": 4, "tensor": 2}
    assert mesh.resolve({**ONE, "fsdp": -1}, 1) == ONE


@pytest.mark.parametrize(
    ("sizes", "devices", "words"),
    [
        ({"data": 3}, 8, "mesh: data 3 does not fit 8 device"),
        ({"data": 3, "fsdp": -1}, 8, "does not fit 8 device"),
        ({"data": -1, "fsdp": -1}, 8, "mesh.fsdp=-1, but mesh.data is -1"),
        ({"tensor": 0}, 1, "mesh.tensor=0 must be a positive number"),
        ({"tensor": -2}, 1, "mesh.tensor=-2 must be a positive number"),
        ({"tensor": 16}, 8, "make the product of the axes 8"),
    ],
)
def test_impossible_meshes(sizes, devices, words):
    with pytest.raises(ValueError, match="mesh") as error:
        mesh.resolve({**ONE, **sizes}, devices)
    assert words in str(error.value)


def layout(**sizes) -> sharding.Layout:
    abstract = jax.sharding.AbstractMesh(tuple({**ONE, **sizes}.values()), mesh.AXES)
    return sharding.Layout(abstract)


def test_a_mesh_axis_serves_an_array_once():
    spec = layout().spec(("experts", "batch", "time", None))
    assert spec == PartitionSpec(("expert",), ("data", "fsdp"), ("context",), None)


def test_sizes_that_do_not_divide_are_named():
    plan = layout(tensor=4)
    plan.check("parameter x", (6, 8), ("embed", "heads"))
    with pytest.raises(ValueError, match=r"parameter x: its 'heads' axis of 6 .* mesh\.tensor"):
        plan.check("parameter x", (8, 6), ("embed", "heads"))
