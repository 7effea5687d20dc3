"""Blocks and noise do not depend on how many devices hold the array, nor on who rounds it."""

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


KERNELS = """
import functools
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from effarch.kernels import dispatch
from effarch.kernels.hadamard import pallas_gpu as hadamard_gpu, pallas_tpu as hadamard_tpu
from effarch.kernels.hadamard import xla as hadamard_xla
from effarch.kernels.quantize import api, formats, pallas_gpu, pallas_tpu, xla

random = np.random.default_rng(0)
x = np.round(random.standard_normal((512, 256)) * 64) / 64  # sums of 16 are exact in any order
x = x.clip(-2, 2).astype(np.float32)
x[3, 7] = 3  # the largest, which all pieces of NVFP4 must know
seed, signs = np.array([1, 2**31 + 5], np.uint32), random.choice([-1.0, 1.0], 16).astype(np.float32)
mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
cut = NamedSharding(mesh, P(("data", "fsdp"), "tensor"))


def options(form, axis, rotate, is_random, seed, signs):
    fmt = formats.find(form)
    turned = api.Rotation(axis, rotate, signs) if rotate else None
    shrink = fmt.headroom if is_random else 1.0
    axes = api.blocked_axes(x.shape, fmt, axis)
    return fmt, axes, shrink, "even", seed if is_random else None, turned


CASES = [("nvfp4", 0, 16, True), ("nvfp4", 1, 0, False), ("mxfp4", 1, 0, True)]


@jax.jit
def whole(x, seed, signs):
    found = [xla.quantize(x, *options(*case, seed, signs)) for case in CASES]
    return found, hadamard_xla.hadamard(x, 16, 1, signs)


def in_pieces(kernel, transform):
    @functools.partial(jax.jit, in_shardings=(cut, None, None))
    def run(x, seed, signs):
        found = [
            kernel.quantize(x, *options(*case, seed, signs), cut, interpret=True) for case in CASES
        ]
        return found, transform.hadamard(x, 16, 1, signs, cut, interpret=True)

    return run(x, seed, signs)


want = whole(x, seed, signs)
for pair in ((pallas_tpu, hadamard_tpu), (pallas_gpu, hadamard_gpu)):
    got = in_pieces(*pair)
    assert got[0][0][0].sharding.is_equivalent_to(cut, 2)
    jax.tree.map(np.testing.assert_array_equal, got, want)
    try:
        pair[0].quantize(jnp.ones((32, 256)), *options(*CASES[0], seed, signs), cut)
    except dispatch.Unsupported as why:
        assert "inside blocks of 16" in str(why)
    else:
        raise AssertionError
print("equal")
"""


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.parametrize("program", [PROGRAM, KERNELS], ids=["products", "kernels"])
def test_eight_devices_round_as_one(program):
    flags = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=dict(os.environ, XLA_FLAGS=flags, JAX_PLATFORMS="cpu"),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == "equal"
