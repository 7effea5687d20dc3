"""COAT's update: every backend against Adam in float64; the kernels, interpreted, against plain JAX."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from effarch.kernels import coat_adam, dispatch
from effarch.kernels.coat import api, pallas_gpu, pallas_tpu, reference, xla
from effarch.kernels.quantize import e4m3_bits

RATES = dict(b1=0.9, b2=0.95, eps=1e-8)
SHAPE = (2, 32, 384)


def inputs():
    """A gradient with groups of zeros and of equal values, and moments after some steps."""
    rng = np.random.default_rng(0)
    g, m = (rng.standard_normal(SHAPE).astype(np.float32) for _ in range(2))
    v = np.exp(3 * rng.standard_normal(SHAPE)).astype(np.float32)
    for x in (g, m, v):
        x[0, 0, :128], x[0, 1, :128], x[1, 5, :7] = 0, 0.37, 0
    return g, m, v


@jax.jit
def run(g, m, v):
    """(d, m, v) of each backend from moments stored alike, and the moments as they were."""
    m, v = (xla.store(x, 128, True) for x in (m, v))
    start = 1 / jnp.array([1 - RATES["b1"] ** 7, 1 - RATES["b2"] ** 7], jnp.float32)
    args = (g, m, v, start, tuple(RATES.values()), 128, True)
    found = {
        "api": coat_adam(g, m, v, jnp.int32(7), **RATES),
        "reference": reference.coat_adam(*args),
        "tpu": pallas_tpu.coat_adam(*args, interpret=True),
        "gpu": pallas_gpu.coat_adam(*args, interpret=True),
    }
    return found, (m, v)


def restored(moment):
    """Group by group in float64."""
    codes = np.asarray(moment.codes).astype(np.float64).reshape(-1, 128)
    hi, k = np.asarray(moment.shared, np.float64).reshape(-1, 2).T
    values = np.sign(codes) * hi[:, None] * (np.abs(codes) / 448) ** (1 / k[:, None])
    return values.reshape(SHAPE)


def test_every_backend_is_adam_on_stored_moments():
    g, *moments = inputs()
    found, before = jax.device_get(run(g, *moments))
    old_m, old_v = (restored(x) for x in before)
    m = RATES["b1"] * old_m + (1 - RATES["b1"]) * g
    v = RATES["b2"] * old_v + (1 - RATES["b2"]) * g.astype(np.float64) ** 2
    d = (m / (1 - RATES["b1"] ** 7)) / (np.sqrt(v / (1 - RATES["b2"] ** 7)) + RATES["eps"])
    for name, (got, *stored) in found.items():
        np.testing.assert_allclose(got, d, rtol=1e-4, atol=1e-6, err_msg=name)
        for moment, exact in zip(stored, (m, v)):
            size, kept = (np.abs(x).reshape(-1, 128) for x in (exact, restored(moment)))
            hi, k = np.asarray(moment.shared, np.float64).reshape(-1, 2, 1).swapaxes(0, 1)
            np.testing.assert_allclose(hi[:, 0], size.max(1), rtol=1e-5)
            share = 448 * (size / np.where(hi > 0, hi, 1)) ** k
            slack = np.maximum(share / 16, 2.0**-10) * 1.001  # half a step of E4M3
            low, high = (
                hi * (np.maximum(x, 0) / 448) ** (1 / k) for x in (share - slack, share + slack)
            )
            assert np.all((kept >= low * (1 - 1e-4)) & (kept <= high * (1 + 1e-4))), name
            assert np.all((kept == 0) == (size == 0)), name  # nothing but zeros becomes zero
            signs = np.sign(restored(moment)) == np.sign(exact)
            assert np.all(signs), name


@pytest.mark.parametrize("name", ["tpu", "gpu"])
def test_kernels_store_what_plain_jax_stores(name):
    found, _ = jax.device_get(run(*inputs()))
    for one, other in zip(found[name][1:], found["api"][1:]):
        np.testing.assert_allclose(one.shared, other.shared, rtol=1e-6)
        same = one.codes.view(np.uint8) == other.codes.view(np.uint8)
        # Powers may differ in their last bit, and a value on an edge then goes the other way.
        assert same.mean() > 0.999


def test_all_bits_of_e4m3_are_those_of_ml_dtypes():
    bits = np.array([b for b in range(256) if b & 0x7F != 0x7F], np.uint8)
    values = bits.view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    decoded, encoded = jax.jit(lambda b, x: (e4m3_bits.decode(b), e4m3_bits.encode(x)))(
        bits.view(np.int8), values
    )
    np.testing.assert_array_equal(np.asarray(decoded).view(np.uint32), values.view(np.uint32))
    np.testing.assert_array_equal(np.asarray(encoded).view(np.uint8), bits)


def test_what_does_not_fit_is_said():
    g = jnp.zeros(SHAPE)
    moment = api.Moment(
        jnp.zeros(SHAPE, jnp.float8_e4m3fn), jnp.ones((*SHAPE[:-1], SHAPE[-1] // 128, 2))
    )
    with pytest.raises(ValueError, match=r"v has codes .* not those of a gradient"):
        coat_adam(g, moment, moment._replace(codes=moment.codes[0]), 1, **RATES)
    for name in ("tpu", "gpu"):
        with pytest.raises(dispatch.Unsupported, match=f"runs on {name.upper()}s"):
            coat_adam(g, moment, moment, 1, **RATES, backend=f"pallas_{name}")
