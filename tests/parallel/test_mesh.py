"""Mesh sizes and the rules table."""

import os

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from effarch.parallel import mesh, partitioner, sharding

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


def test_heads_stay_whole():
    plan = layout(tensor=2)
    plan.check("parameter q", (8, 4 * 3), ("embed", "heads"), (1, 3))
    with pytest.raises(ValueError, match=r"parameter q: its 'heads' axis of 3 x 4 .* mesh\.tensor"):
        plan.check("parameter q", (8, 3 * 4), ("embed", "heads"), (1, 4))


def test_rules_can_be_changed():
    table = sharding.rules(("stream=context", "ffn = tensor+expert", "vocab="))
    assert dict(table)["stream"] == ("context",)
    assert dict(table)["ffn"] == ("tensor", "expert")
    assert dict(table)["vocab"] == ()
    assert sharding.rules() == sharding.RULES


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("ffn", "'ffn' must be LOGICAL=AXIS"),
        ("fnn=tensor", "Did you mean 'ffn'"),
        ("ffn=tenser", "Did you mean 'tensor'"),
    ],
)
def test_wrong_rules_are_one_sentence(change, words):
    with pytest.raises(ValueError, match=r"mesh\.rules") as error:
        sharding.rules((change,))
    assert words in str(error.value)


def test_large_arrays_that_lie_whole_are_found():
    devices = np.array(jax.devices()[:1]).reshape((1,) * len(mesh.AXES))
    plan = sharding.Layout(jax.sharding.Mesh(devices, mesh.AXES))
    arrays = {name: jax.ShapeDtypeStruct((512, 512), "float32") for name in ("cut", "whole")}
    arrays["small"] = jax.ShapeDtypeStruct((4,), "float32")
    abstract_mesh = layout(fsdp=4).mesh
    places = {
        "cut": jax.sharding.NamedSharding(abstract_mesh, PartitionSpec("fsdp")),
        "whole": jax.sharding.NamedSharding(abstract_mesh, PartitionSpec()),
        "small": plan.sharding((None,)),
    }
    assert partitioner.left_whole(arrays, places) == {"whole": 512 * 512 * 4}


def test_the_partitioners_complaints_are_collected_and_the_rest_is_printed(capfd):
    with partitioner.heard() as complaints:
        os.write(2, b"W0: Involuntary full rematerialization. x\nsomething else\n")
    assert len(complaints) == 1
    assert capfd.readouterr().err == "something else\n"
