"""Blocks and noise do not depend on how many devices hold the array."""

import os
import subprocess
import sys

import pytest

PROGRAM = """
import functools
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from effarch.quantization import matmul, recipes

random = np.random.default_rng(0)
x, w, e = (random.standard_normal(s).astype(np.float32) for s in ((8, 64, 64), (64, 96), (8, 64, 96)))
seed = np.array([1, 2], np.uint32)
mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)

for kind in ("mxfp8", "nvfp4", "quartet"):
    recipe = recipes.build(kind)

    def run(x, w, e):
        def product(x, w):
            return matmul.quantized_matmul(x, w, recipe, dtype=jnp.float32, seed=seed)

        y, vjp = jax.vjp(product, x, w)
        return y, *vjp(e)

    want = jax.jit(run)(x, w, e)
    axes = (("data",), (None, "tensor"), ("data", None, "tensor"))
    places = [NamedSharding(mesh, P(*names)) for names in axes]
    got = jax.jit(run, in_shardings=places)(x, w, e)
    assert len(got[0].sharding.device_set) == 8
    for one, other in zip(got, want):
        assert np.linalg.norm(one - other) < 1e-6 * np.linalg.norm(other), kind
print("equal")
"""


@pytest.mark.slow
@pytest.mark.ci
def test_eight_devices_round_as_one():
    flags = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env=dict(os.environ, XLA_FLAGS=flags, JAX_PLATFORMS="cpu"),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == "equal"
