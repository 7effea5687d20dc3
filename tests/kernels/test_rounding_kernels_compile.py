"""The kernels of low precision and of sparsity pass the compilers of TPUs and GPUs that are not here."""

import pathlib

import pytest

from effarch.parallel import topologies

ROOT = pathlib.Path(__file__).resolve().parents[2]
SCRIPT = """
import sys
import jax, jax.numpy as jnp
from effarch import kernels
from effarch.kernels import platform
from effarch.kernels.coat import api as coat
from effarch.parallel import topologies

target, op = topologies.parse(sys.argv[1]), sys.argv[2]
kind = target.device.platform
mesh = jax.sharding.Mesh(topologies.devices(target)[:1], ("data",))
place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
T, D, F = 512, 1024, 2048
NARROW = jnp.bfloat16
backend = f"pallas_{kind}"

def array(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

def both(form, axes):
    shapes = (((T, D), 1), ((D, F), axes))
    return [
        jax.tree.map(
            lambda x: array(*x.shape, dtype=x.dtype),
            jax.eval_shape(
                lambda x: kernels.quantize(x, form, axis=axis, backend="xla"), array(*shape)
            ),
        )
        for shape, axis in shapes
    ]

def rounded(form, axis, rotate):
    def run(x, words):
        options = dict(axis=axis, rotate=rotate, rounding="stochastic")
        key = jax.random.wrap_key_data(words)
        q = kernels.quantize(x, form, key=key, backend=backend, **options)
        return q.dequantize().astype(NARROW)
    return run, (array(T, D, dtype=NARROW), array(2, dtype=jnp.uint32))

def top_k(x, dy):
    y, pull = jax.vjp(lambda x: kernels.statistical_top_k(x, 100, backend=backend), x)
    return y, pull(dy)

moment = coat.Moment(array(T, D, dtype=jnp.float8_e4m3fn), array(T, D // 128, 2))
rates = dict(b1=0.9, b2=0.95, eps=1e-8)
OPS = {
    "mxfp4 rows": lambda: rounded("mxfp4", 1, 32),
    "mxfp4 columns": lambda: rounded("mxfp4", 0, 32),
    "nvfp4": lambda: rounded("nvfp4", 0, 16),
    "hadamard": lambda: (
        lambda x: kernels.hadamard(x, block_size=128, backend=backend), (array(T, D),)
    ),
    "coat": lambda: (
        lambda g, m, v, count: kernels.coat_adam(g, m, v, count, **rates, backend=backend),
        (array(T, D), moment, moment, array(dtype=jnp.int32)),
    ),
    **{
        f"product {form}": lambda form=form, axes=axes: (
            lambda a, b: kernels.block_matmul(a, b, dtype=NARROW, backend=backend), both(form, axes)
        )
        for form, axes in (("mxfp8", 0), ("nvfp4", 0), ("deepseek", (0, 1)))
    },
    "top_k": lambda: (top_k, (array(T, 13824, dtype=NARROW), array(T, 13824, dtype=NARROW))),
    "sparse_ffn": lambda: (
        lambda *x: kernels.sparse_ffn(*x, backend=backend),
        [array(*s, dtype=NARROW) for s in ((2, F), (2, 256), (F, 2, 128), (F, D // 128, 128))],
    ),
}
with platform.tracing_for(kind), jax.sharding.set_mesh(mesh):
    for name, make in OPS.items():
        if not name.startswith(op):
            continue
        function, arguments = make()
        text = jax.jit(function).lower(*arguments).compile().as_text()
        calls = {"tpu": "tpu_custom_call", "gpu": "__gpu$xla.gpu.triton"}[kind]
        print(name, text.count(calls), sep=":", flush=True)
"""
KERNELS = {
    "mxfp4": [1, 1],
    "nvfp4": [2],
    "hadamard": [1],
    "coat": [1],
    "product": [1, 1, 1],
    "top_k": [2],
    "sparse_ffn": [{"tpu": 1, "gpu": 2}],
}
"""How many of ours are in each program."""


@pytest.mark.slow
@pytest.mark.parametrize("op", KERNELS)
@pytest.mark.parametrize("target", ["v5e", "v5p", "v6e", "tpu7x", "a100", "h100", "b200"])
def test_kernels_compile(compile_for, target, op):
    kind = topologies.parse(target).device.platform
    done = compile_for(SCRIPT, target, op)
    assert done.returncode == 0, done.stderr[-2000:]
    counts = [int(line.rsplit(":", 1)[1]) for line in done.stdout.split("\n") if ":" in line]
    assert counts == [x[kind] if isinstance(x, dict) else x for x in KERNELS[op]]
