"""Quantized layers hand their kernels each device's own piece: compiled for chips that are not there."""

import pytest

SCRIPT = """
import sys

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from effarch.kernels import platform
from effarch.models.context import Context
from effarch.models.layers import linear, quantizer
from effarch.parallel import mesh, sharding, topologies
from effarch.quantization import recipes


class Block(nnx.Module):
    def __init__(self, recipe, rngs):
        self.up = linear.Linear(1024, 2048, axes=("embed", "ffn"), dtype=jnp.bfloat16, rngs=rngs)
        quantizer.attach(self, {"up": recipe})


def compiled(recipe, shape):
    shape = dict.fromkeys(mesh.AXES, 1) | shape
    layout = sharding.Layout(mesh.make(shape, topologies.devices(target)[:8]))

    def array(leaf, *logical):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=layout.sharding(logical))

    block = nnx.eval_shape(lambda: Block(recipe, nnx.Rngs(0)))
    graphdef, params = nnx.split(block, nnx.Param)

    def loss(params, x, words):
        block = nnx.merge(graphdef, params)
        quantizer.prepare(block, Context(key=jax.random.wrap_key_data(words), layout=layout))
        return (block.up(x) ** 2).astype(jnp.float32).sum()

    params = {"up": {"kernel": array(params["up"]["kernel"].get_value(), "embed", "ffn")}}
    x = array(jax.ShapeDtypeStruct((8, 256, 1024), jnp.bfloat16), "batch", None, None)
    words = array(jax.ShapeDtypeStruct((2,), np.uint32), None)
    with platform.tracing_for(target.device.platform), jax.sharding.set_mesh(layout.mesh):
        step = jax.jit(jax.grad(loss, argnums=(0, 1)))
        return step.lower(params, x, words).compile().as_text()


target = topologies.parse(sys.argv[1])
call = {"tpu": "tpu_custom_call", "gpu": "__gpu$xla.gpu.triton"}[target.device.platform]
for kind, shape in [
    ("quartet", {"fsdp": 2, "tensor": 4}),
    ("nvfp4", {"fsdp": 2, "tensor": 4}),
    ("quartet", {"data": 4, "context": 2}),
]:
    print(kind, *shape, compiled(recipes.build(kind), shape).count(call), flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("target", ["v6e:2x4", "h100:1x1x8"])
def test_kernels_round_pieces_of_the_matrices(compile_for, target):
    """Quartet: two transforms forward and two back, four roundings. NVFP4: lines of x, e and their
    two transforms with a search for the largest each; tiles of w are not the kernels'."""
    done = compile_for(SCRIPT, target)
    assert done.returncode == 0, done.stderr[-3000:]
    counts = dict(line.rsplit(" ", 1) for line in done.stdout.strip().split("\n"))
    assert counts == {
        "quartet fsdp tensor": "8",
        "nvfp4 fsdp tensor": "6",
        "quartet data context": "0",
    }
