"""FP8 copies for the backward pass: gradients at the copies, and what a layer keeps."""

import functools
import math

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

from effarch.kernels import platform
from effarch.models.context import Context
from effarch.models.ffns import glu
from effarch.models.layers import norm, quantizer
from effarch.quantization import matmul, recipes

X = np.random.default_rng(0).standard_normal((4, 16, 64)).astype(np.float32)
DY = np.random.default_rng(1).standard_normal((4, 16, 64)).astype(np.float32)


def copies(x, group):
    """E4M3 under the least power of two that clips nothing."""
    blocks = x.reshape(-1, group).astype(np.float64)
    scale = 2.0 ** np.ceil(np.log2(np.abs(blocks).max(1, keepdims=True) / 448))
    values = (blocks / scale).astype(ml_dtypes.float8_e4m3fn).astype(np.float64) * scale
    return values.reshape(x.shape)


def test_a_norms_gradient_is_that_at_the_copy():
    @functools.partial(jax.jit, static_argnums=0)
    def run(group, x, scale, dy):
        layer = norm.RMSNorm(64)
        layer.saved_group = group

        graphdef, _ = nnx.split(layer)

        def apply(x, scale):
            return nnx.merge(graphdef, {"scale": scale})(x)

        y, vjp = jax.vjp(apply, x, scale)
        return y, *vjp(dy)

    scale = np.linspace(0.5, 2, 64, dtype=np.float32)
    exact, small = run(0, X, scale, DY), run(16, X, scale, DY)
    np.testing.assert_array_equal(exact[0], small[0])
    at_copy = run(0, copies(X, 16).astype(np.float32), scale, DY)
    for one, other in zip(small[1:], at_copy[1:]):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)
    error = np.linalg.norm(small[1] - exact[1]) / np.linalg.norm(exact[1])
    assert 0.005 < error < 0.06


def kept_bytes(group, recipe):
    """Bytes of the activations that a gated feed-forward keeps, traced as for a TPU."""
    with platform.tracing_for("tpu"):
        layer = glu.Glu(64, hidden=128, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
        quantizer.keep_small(layer, group)
        for one in (layer.gate, layer.up, layer.down):
            one.quantizer = quantizer.Quantizer(recipe) if recipe else None
        graphdef, state = nnx.split(layer)

        def apply(x):
            return nnx.merge(graphdef, state)(x, Context())[0]

        x = jax.ShapeDtypeStruct((4, 128, 64), jnp.bfloat16)
        kept = jax.eval_shape(lambda x: jax.vjp(apply, x)[1], x)
        leaves = [leaf for leaf in jax.tree.leaves(kept) if math.prod(leaf.shape) >= 4 * 128 * 4]
        weights = {64 * 128}
        return sum(x.size * x.dtype.itemsize for x in leaves if x.size not in weights)


def test_what_a_feed_forward_keeps_is_about_half():
    tokens, hidden, width = 4 * 128, 128, 64
    exact = kept_bytes(0, None)
    small = kept_bytes(16, recipes.fp8_current())
    # x of gate and of up, gate and up and their product in FP8, a byte of scale for each 16 of the two.
    want = tokens * (2 * width + 3 * hidden + 2 * hidden / 16)
    assert small == pytest.approx(want, rel=0.02)
    assert exact >= 1.9 * tokens * (2 * width + 3 * hidden)


def test_a_products_residuals_are_exact_in_fp8():
    """Kept as FP8 numbers or as values: the same gradients."""
    recipe, w = recipes.fp8_current(), DY[0].T.copy()

    @functools.partial(jax.jit, static_argnums=0)
    def run(kind, x, dy):
        with platform.tracing_for(kind):
            y, vjp = jax.vjp(
                lambda x, w: matmul.quantized_matmul(x, w, recipe, dtype=jnp.float32), x, w
            )
            return y, *vjp(dy)

    dy = np.random.default_rng(2).standard_normal((4, 16, 16)).astype(np.float32)
    for one, other in zip(run("cpu", X, dy), run("tpu", X, dy)):
        np.testing.assert_array_equal(one, other)


def test_a_group_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match=r"quantization.saved_group=48 does not divide the width"):
        quantizer.keep_small(glu.Glu(64, hidden=128, rngs=nnx.Rngs(0)), 48)
