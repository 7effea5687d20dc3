"""Layers hand their kernels each device's own piece: compiled for eight chips that are not there."""

import pytest

SCRIPT = """
import sys

import jax
import numpy as np
from flax import nnx

from effarch.kernels import platform
from effarch.models.context import Context
from effarch.models.ffns.spark_ffn import SparkFfn
from effarch.models.layers.short_convs import ShortConvs
from effarch.parallel import mesh, sharding, topologies


class Block(nnx.Module):
    def __init__(self, rngs):
        self.conv = ShortConvs({"q": 512}, 4, use_bias=True, rngs=rngs)
        self.ffn = SparkFfn(512, hidden=256, rngs=rngs)

    def __call__(self, x, ctx):
        convolved, _ = self.conv({"q": x}, ctx, None)
        return self.ffn(convolved["q"], ctx)[0]


def compiled(shape):
    shape = dict.fromkeys(mesh.AXES, 1) | shape
    layout = sharding.Layout(mesh.make(shape, topologies.devices(target)[:8]))

    def array(leaf, *logical):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=layout.sharding(logical))

    graphdef, params = nnx.split(nnx.eval_shape(lambda: Block(nnx.Rngs(0))), nnx.Param)

    def loss(params, x, segment_ids):
        ctx = Context(segment_ids=segment_ids, layout=layout)
        return (nnx.merge(graphdef, params)(x, ctx) ** 2).sum()

    params = jax.tree.map(array, nnx.to_pure_dict(params))
    x = array(jax.ShapeDtypeStruct((8, 256, 512), np.float32), "batch", None, None)
    segment_ids = array(jax.ShapeDtypeStruct((8, 256), np.int32), "batch", None)
    with platform.tracing_for(target.device.platform), jax.sharding.set_mesh(layout.mesh):
        return jax.jit(jax.grad(loss)).lower(params, x, segment_ids).compile().as_text()


target = topologies.parse(sys.argv[1])
for shape, of_conv, of_rows in [
    ({"data": 8}, True, True),
    ({"data": 2, "tensor": 4}, True, False),
    ({"data": 4, "context": 2}, False, True),
]:
    text = compiled(shape)
    for name, expected in [
        ("short_conv_forward", of_conv),
        ("short_conv_backward", of_conv),
        ("statistical_top_k", of_rows),
        ("statistical_top_k_backward", of_rows),
    ]:
        found = f"{name}/pallas_call" in text or f"({name})" in text
        assert found == expected, (shape, name, found)
"""


@pytest.mark.slow
@pytest.mark.parametrize("target", ["v6e:2x4", "h100:1x1x8"])
def test_kernels_run_on_pieces_unless_a_piece_is_not_enough(compile_for, target):
    """With channels cut no device has the neurons of a token, with time cut none what lies before."""
    done = compile_for(SCRIPT, target)
    assert done.returncode == 0, done.stderr[-3000:]
