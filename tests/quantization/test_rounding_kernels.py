"""The kernels that transform and round in one pass, interpreted: bit for bit what plain JAX gives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effarch.kernels import dispatch, hadamard, platform, quantize
from effarch.kernels.hadamard import pallas_gpu as hadamard_gpu
from effarch.kernels.hadamard import pallas_tpu as hadamard_tpu
from effarch.kernels.hadamard import reference as hadamard_reference
from effarch.kernels.quantize import api, formats, pallas_gpu, pallas_tpu, reference, xla

KERNELS = {"tpu": pallas_tpu, "gpu": pallas_gpu}
TRANSFORMS = {"tpu": hadamard_tpu, "gpu": hadamard_gpu}
SLOW = pytest.mark.slow
CASES = {
    # format, axis, stochastic, transform; both axes, all scale rules, every way to round
    "mxfp4": ("mxfp4", 1, True, 32),
    "mxfp4 first": ("mxfp4", 0, True, 32),
    "nvfp4": ("nvfp4", 0, True, 16),
    "nvfp4 plain": ("nvfp4", 1, False, 0),
    "deepseek": ("deepseek", 0, False, 0),
    "mxint8": ("mxint8", 1, False, 0),
}


def coarse(*shape):
    """Multiples of 2^-7 of few bits: sums of 128 of them are exact in whatever order."""
    rng = np.random.default_rng(0)
    x = np.round(rng.standard_normal(shape) * np.exp2(rng.uniform(-3, 2, (shape[0], 1))) * 128)
    return (np.clip(x, -255, 255) / 128).astype(np.float32)


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize(
    "case", ["mxfp4", *(pytest.param(x, marks=SLOW) for x in CASES if x != "mxfp4")]
)
def test_kernels_round_as_the_reference_does_bit_for_bit(name, case):
    form, axis, is_random, rotate = CASES[case]
    x, seed = coarse(256, 256), np.array([1, 2**31 + 5], np.uint32)
    signs = np.random.default_rng(1).choice([-1.0, 1.0], max(rotate, 1)).astype(np.float32)

    @jax.jit
    def run(x, seed, signs):
        fmt = formats.find(form)
        axes = api.blocked_axes(x.shape, fmt, axis)
        rotation = api.Rotation(axis, rotate, signs) if rotate else None
        shrink = fmt.headroom if is_random else 1.0
        options = (fmt, axes, shrink, "even", seed if is_random else None, rotation)
        return (
            KERNELS[name].quantize(x.astype(jnp.bfloat16), *options, interpret=True),
            reference.quantize(x, *options),
            xla.quantize(x, *options),
        )

    got, want, plain = run(x, seed, signs)
    for one, other in zip(got, want):
        np.testing.assert_array_equal(one, other)
    if rotate != 32:  # sqrt(32) is in the entries of xla's matrix, rounded
        for one, other in zip(got, plain):
            np.testing.assert_array_equal(one, other)


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_and_their_gradients_are_the_references(name):
    """Whole numbers: sums of products of them are exact."""
    rng = np.random.default_rng(2)
    x, dy = (rng.integers(-8, 9, (256, 128)).astype(np.float32) for _ in range(2))
    signs = rng.choice([-1.0, 1.0], 64).astype(np.float32)

    @jax.jit
    def run(x, dy, signs):
        found = []
        for axis in (0, 1):
            pair = []
            for transform in (
                lambda *a: TRANSFORMS[name].hadamard(*a, interpret=True),
                hadamard_reference.hadamard,
            ):
                y, pull = jax.vjp(lambda x, s, t=transform, a=axis: t(x, 64, a, s), x, signs)
                pair.append((y, *pull(dy)))
            plain = TRANSFORMS[name].hadamard(x, 64, axis, None, interpret=True)
            found.append((pair, plain, hadamard(x, block_size=64, axis=axis)))
        return found

    for (got, want), plain, other in run(x, dy, signs):
        for one, two in zip(got, want):  # 64^-1/2 is a power of two
            np.testing.assert_array_equal(one, two)
        np.testing.assert_array_equal(plain, other)


def test_quantize_transforms_first_if_asked():
    x = coarse(64, 64)
    signs = np.random.default_rng(1).choice([-1.0, 1.0], 16).astype(np.float32)

    @jax.jit
    def run(x, signs):
        rotated = hadamard(x, block_size=16, signs=signs)
        fused = quantize(x, "nvfp4", rotate=16, signs=signs)
        return fused.dequantize(), quantize(rotated, "nvfp4").dequantize()

    np.testing.assert_array_equal(*run(x, signs))
    with pytest.raises(ValueError, match="needs one dimension to transform"):
        quantize(x, "nvfp4", axis=(0, 1), rotate=16)


def test_what_the_kernels_do_not_take_is_said():
    x = jnp.ones((128, 128))
    for name in KERNELS:
        with pytest.raises(dispatch.Unsupported, match=f"runs on {name.upper()}s"):
            quantize(x, "mxfp4", backend=f"pallas_{name}")
        with pytest.raises(dispatch.Unsupported, match=f"runs on {name.upper()}s"):
            hadamard(x, block_size=32, backend=f"pallas_{name}")
        for options, words in (
            (dict(fmt="int8", axis=1, x=jnp.ones((128, 96))), "blocks of 96 are not"),
            (dict(fmt="deepseek", axis=(0, 1), x=x), "blocks of 128 x 128 are not"),
            (dict(fmt="mxfp4", axis=1, x=jnp.ones((3, 32))), "3 x 32"),
        ):
            fmt = formats.find(options["fmt"])
            axes = api.blocked_axes(options["x"].shape, fmt, options["axis"])
            with pytest.raises(dispatch.Unsupported, match=words):
                KERNELS[name].quantize(
                    options["x"], fmt, axes, 1.0, "even", None, None, interpret=True
                )


def test_a_program_for_several_devices_takes_no_kernel(monkeypatch):
    """A kernel cannot be split; inside `shard_map` it need not be."""
    devices = np.array(jax.devices()[:1])
    mesh = jax.sharding.Mesh(devices, ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    with jax.sharding.set_mesh(mesh):
        assert platform.is_one_device()
    wide = jax.sharding.AbstractMesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    with jax.sharding.use_abstract_mesh(wide):
        assert not platform.is_one_device()
        with platform.tracing_for("tpu"), pytest.raises(dispatch.Unsupported, match="be split"):
            quantize(jnp.ones((128, 128)), "mxfp4", backend="pallas_tpu")
    monkeypatch.setattr(jax, "device_count", lambda: 8)
    assert not platform.is_one_device()
