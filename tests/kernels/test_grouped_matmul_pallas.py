"""The grouped product's kernels for TPUs and GPUs, interpreted and judged by a loop over groups.

Where the interpreter finds memory that nothing has written, it reads NaN.
"""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effarch.kernels import dispatch, platform
from effarch.kernels.grouped_matmul import api, pallas_gpu, pallas_tpu

ROOT = pathlib.Path(__file__).resolve().parents[2]
M, D, F, E, R = 640, 256, 384, 4, api.BLOCK
SIZES = {"empty": [R, 0, 3 * R, 0], "tail": [0, R, R, R], "full": [2 * R, R, R, R], "none": [0] * E}


MODULES = {"tpu": pallas_tpu, "gpu": pallas_gpu}


@functools.partial(jax.jit, static_argnums=4)
def run(x, w, g, sizes, backend):
    def product(x, w):
        return MODULES[backend].grouped_matmul(x, w, sizes, aligned=R, interpret=True)

    y, pull = jax.vjp(product, x, w)
    return y, *pull(g)


@pytest.mark.parametrize("backend", MODULES)
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_values_and_gradients_equal_a_loop_over_groups(sizes, backend, monkeypatch):
    # Matrices in pieces: two along the contraction, one or three along the outputs.
    monkeypatch.setattr(pallas_tpu, "_MATRIX_BYTES", 128 * 128 * 4)
    rng = np.random.default_rng(0)
    x, w, g = (
        rng.standard_normal(shape).astype(np.float32) for shape in ((M, D), (E, D, F), (M, F))
    )
    actual = run(x, w, g, np.array(sizes, np.int32), backend)
    expected = (np.zeros((M, F)), np.zeros((M, D)), np.zeros((E, D, F)))
    start = 0
    for e, size in enumerate(sizes):
        own = slice(start, start + size)
        expected[0][own], expected[1][own] = x[own] @ w[e], g[own] @ w[e].T
        expected[2][e] = x[own].T @ g[own]
        start += size
    for a, b in zip(actual, expected):
        np.testing.assert_allclose(a, b, atol=1e-3)
        assert np.all(np.asarray(a)[b == 0] == 0)  # tail rows and empty groups: exactly


def test_what_it_does_not_take_is_said():
    x, w, sizes = jnp.zeros((M, D)), jnp.zeros((E, D, F)), jnp.zeros(E, jnp.int32)
    for name in MODULES:
        with pytest.raises(dispatch.Unsupported, match=f"runs on {name.upper()}s"):
            api.grouped_matmul(x, w, sizes, aligned=R, backend=f"pallas_{name}")
    for change, message in (
        (dict(aligned=64), "multiples of 64 rows"),
        (dict(x=jnp.zeros((M, 96)), w=jnp.zeros((E, 96, F))), r"matrices of \(96, 384\)"),
    ):
        arguments = dict(x=x, w=w, group_sizes=sizes, aligned=R) | change
        for module in MODULES.values():
            with pytest.raises(dispatch.Unsupported, match=message):
                module.grouped_matmul(**arguments, interpret=True)
    with platform.tracing_for("tpu"):
        assert api.alignment(128 * E, E) == R and api.alignment(127 * E, E) == 1


@pytest.mark.parametrize("name", MODULES)
def test_feed_forwards_are_three_products_on_accelerators(name):
    """Three kernels forward and two for the gradients of each."""
    shapes = [(M, D), (E, D, F), (E, D, F), (E, F, D)]
    arrays = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]

    def total(x, gate, up, down):
        sizes = jnp.zeros(E, jnp.int32)
        y = api.grouped_feed_forward(x, (gate, up), down, sizes, jax.nn.silu, aligned=R)
        return jnp.sum(y.astype(jnp.float32))

    with platform.tracing_for(name):
        traced = jax.make_jaxpr(jax.grad(total, argnums=(0, 1, 2, 3)))(*arrays)
    assert str(traced).count("pallas_call[") == 9


SCRIPT = """
import sys
import jax, jax.numpy as jnp
from effarch.kernels import grouped_matmul, platform
from effarch.parallel import topologies

target = topologies.parse(sys.argv[1])
devices = topologies.devices(target)[:4]
mesh = jax.make_mesh((4,), ("expert",), devices=devices, axis_types=(jax.sharding.AxisType.Auto,))
P = jax.sharding.PartitionSpec
M, D, F, E = 4 * 4096, 2048, 1792, 4

def array(*shape, dtype=jnp.bfloat16):
    place = jax.sharding.NamedSharding(mesh, P("expert"))
    return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

def loss(x, w, sizes):
    product = jax.shard_map(
        lambda x, w, n: grouped_matmul(x, w, n, aligned=128), mesh=mesh,
        in_specs=(P("expert"),) * 3, out_specs=P("expert"),
    )
    return jnp.sum(product(x, w, sizes).astype(jnp.float32) ** 2)

arguments = array(M, D), array(4 * E, D, F), array(4 * E, dtype=jnp.int32)
with platform.tracing_for(target.device.platform):
    compiled = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(*arguments).compile()
text = compiled.as_text()
kernels = {"tpu": "tpu_custom_call", "gpu": "__gpu$xla.gpu.triton"}[target.device.platform]
print(text.count(kernels), "kernels", flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "target", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1", "a100:1x1x4", "h100:1x1x4"]
)
def test_forward_and_backward_compile_inside_shard_map(compile_for, target):
    done = compile_for(SCRIPT, target)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout.split()[0]) == 3  # the product and its two gradients
