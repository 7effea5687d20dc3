"""Products of quantized blocks against their dequantized copies in float64, interpreted kernels too."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effarch.kernels import block_matmul, dispatch, quantize
from effarch.kernels.block_matmul import pallas_gpu, pallas_tpu

M, K, N = 128, 512, 256
FORMATS = {
    # the format, and b's axes
    "mxfp8": ("mxfp8", 0),
    "nvfp4": ("nvfp4", 0),
    "nvfp4 tiles": ("nvfp4", (0, 1)),
    "deepseek": ("deepseek", (0, 1)),
}
SLOW = pytest.mark.slow


def matrices():
    rng = np.random.default_rng(0)
    a, b = (
        rng.standard_normal(s) * np.exp2(2 * rng.standard_normal((s[0], 1)))
        for s in ((M, K), (K, N))
    )
    return a.astype(np.float32), b.astype(np.float32)


@functools.partial(jax.jit, static_argnums=2)
def run(a, b, name):
    """Every backend, and the numbers that the blocks stand for."""
    fmt, axes = FORMATS[name]
    qa, qb = quantize(a, fmt, axis=1), quantize(b, fmt, axis=axes)
    size, scale = qa.axes[0][1], qa.tensor_scale * qb.tensor_scale
    found = {
        "reference": block_matmul(qa, qb, backend="reference"),
        "xla": block_matmul(qa, qb),
        "tpu": scale * pallas_tpu.block_matmul(qa, qb, size, interpret=True),
        "gpu": scale * pallas_gpu.block_matmul(qa, qb, size, interpret=True),
    }
    return found, qa.dequantize(), qb.dequantize()


@pytest.mark.parametrize(
    "name", ["mxfp8", *(pytest.param(x, marks=SLOW) for x in FORMATS if x != "mxfp8")]
)
def test_every_backend_multiplies_the_numbers_that_the_blocks_stand_for(name):
    found, a, b = jax.device_get(run(*matrices(), name))
    want = a.astype(np.float64) @ b.astype(np.float64)
    size = np.abs(a).astype(np.float64) @ np.abs(b)
    for backend, y in found.items():
        # Sums of 512 float32 terms; nothing else is rounded.
        assert np.abs(y - want).max() / size.max() < 1e-6, backend


@pytest.mark.slow
@pytest.mark.ci
def test_ones_and_single_tiles():
    """All ones give K; a block of twos in one row gives its product alone."""
    ones, spot = np.ones((M, K), np.float32), np.zeros((M, K), np.float32)
    spot[5, 128:256] = 2
    want = np.zeros((M, N))
    want[5] = 256
    for a, expected in ((ones, np.full((M, N), K)), (spot, want)):
        found, _, _ = run(a, np.ones((K, N), np.float32), "deepseek")
        for y in found.values():
            np.testing.assert_allclose(y, expected, rtol=1e-6)


def test_what_does_not_fit_is_said():
    one = jax.jit(functools.partial(quantize, format="mxfp8"), static_argnames="axis")
    a, b = (one(jnp.ones((64, 64)), axis=axis) for axis in (1, 0))
    with pytest.raises(ValueError, match=r"do not fit; give a \[M,K\] with blocks along 1"):
        block_matmul(b, a)
    for name in ("tpu", "gpu"):
        with pytest.raises(dispatch.Unsupported, match=f"runs on {name.upper()}s"):
            block_matmul(a, b, backend=f"pallas_{name}")
    many = jax.eval_shape(lambda x: quantize(x, "mxfp8"), jnp.zeros((1024, 64)))
    for module in (pallas_tpu, pallas_gpu):
        with pytest.raises(dispatch.Unsupported, match="with 1024 rows, more than 512"):
            module.block_matmul(many, b, 32, interpret=True)
