"""A model that a mesh cannot hold is refused with the parameter and the axis, before compiling."""

import math

import jax
import pytest

from effarch import config, config_check
from effarch.configs import gated_deltanet, machines
from effarch.parallel import mesh, sharding
from effarch.training import setup


@pytest.fixture
def model():
    c = config.default()
    c.model.layers, c.model.depth, c.model.width = "attention/glu", 1, 24
    c.model.blocks.attention.update(num_heads=3, head_dim=8)
    c.model.blocks.glu.hidden = 32
    c.data.batch_size, c.data.seq_len = 8, 16
    return c


def plan(c, **sizes):
    shape = {**dict.fromkeys(mesh.AXES, 1), **sizes}
    c.mesh.update(shape)
    devices = 1
    for size in sizes.values():
        devices *= size
    checked = config_check.finish(c, num_devices=devices)
    return setup.on_mesh(
        checked, jax.sharding.AbstractMesh(tuple(shape.values()), mesh.AXES), vocab_size=64
    )


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        # 24 columns could be cut in two, but not three heads.
        ({"tensor": 2}, "parameter layers/0/mixer/k/kernel: its 'heads' axis of 3 x 8"),
        ({"fsdp": 16}, "data.batch_size=8 cannot be split over 16 devices"),
        ({"context": 3}, "data.seq_len=16 cannot be split over mesh.context=3"),
        ({"context": 4, "tensor": 8}, "data.batch_size x data.seq_len: its 'stream' axis of 16"),
    ],
)
def test_one_sentence_names_what_does_not_fit(model, sizes, words):
    with pytest.raises(ValueError, match="cannot be split") as error:
        plan(model, **sizes)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_a_changed_rule_is_a_way_out(model):
    model.mesh.rules = ("heads=",)
    found = plan(model, tensor=2)
    assert found.layout.rules != sharding.RULES
    assert found.shardings.params["layers"]["0"]["mixer"]["q"]["kernel"].spec[2] is None


@pytest.mark.parametrize("machine", machines.MACHINES)
@pytest.mark.parametrize("size", ["50m", "340m", "1.3b"])
def test_batches_of_shipped_sizes_fit_shipped_machines(machine, size):
    c = gated_deltanet.get_config(f"size={size},on={machine}")
    devices = math.prod(c.mesh[axis] for axis in mesh.AXES)
    checked = config_check.finish(c, num_devices=devices)
    assert checked.data.batch_size % (devices * checked.train.accumulate) == 0
    published = gated_deltanet.get_config(f"size={size}")
    tokens = checked.data.batch_size * checked.train.num_steps
    assert tokens == pytest.approx(published.data.batch_size * published.train.num_steps, rel=0.01)


@pytest.mark.parametrize(
    "machine", [pytest.param("h100x8", marks=[pytest.mark.slow, pytest.mark.ci]), "v5p-1024"]
)
def test_shipped_machines_leave_nothing_large_whole(machine):
    c = gated_deltanet.get_config(f"size=1.3b,layers=hybrid,on={machine}")
    found = plan(c, **{axis: c.mesh[axis] for axis in mesh.AXES if c.mesh[axis] > 1})
    assert found.left_whole() == ""
