"""Qwix, Google's quantization library, as an independent implementation of what both have."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from effarch.quantization import matmul, recipes

qwix = pytest.importorskip("qwix", reason="qwix is not installed (extra test)")

pytestmark = [pytest.mark.slow, pytest.mark.ci]  # importing and tracing Qwix takes seconds

T, I, O = 96, 64, 128


def gaussian(*shape, seed):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


X, W, E = gaussian(T, I, seed=0), gaussian(I, O, seed=1) / 8, gaussian(T, O, seed=2)
EXACT = (X @ W, E @ W.T, X.T @ E)


def run(product):
    @jax.jit
    def with_gradients(x, w, e):
        y, vjp = jax.vjp(product, x, w)
        return y, *vjp(e)

    return with_gradients(X, W, E)


def ours(kind, **options):
    """y, dx, dw of a linear layer."""
    recipe = recipes.build(kind, **options)
    y, vjp = jax.vjp(lambda x, w: matmul.quantized_matmul(x, w, recipe, dtype=jnp.float32), X, W)
    return y, *vjp(E)


def theirs(qtype, *, backward=True, tile=None):
    """The same by `nnx.Linear` under Qwix, every operand in the one type."""
    rule = dict(weight_qtype=qtype, act_qtype=qtype, tile_size=tile)
    if backward:
        kept = {"dlhs_residual_qtype": qtype, "drhs_residual_qtype": qtype}
        tiles = {"dlhs_tile_size": tile, "drhs_tile_size": tile}
        rule |= dict(bwd_qtype=qtype, additional_qt_config=kept | tiles)
    layer = nnx.Linear(I, O, use_bias=False, rngs=nnx.Rngs(0))
    provider = qwix.QtProvider([qwix.QtRule(module_path=".*", **rule)])
    graphdef, params, rest = nnx.split(qwix.quantize_model(layer, provider, X), nnx.Param, ...)

    def product(x, w):
        return nnx.merge(graphdef, jax.tree.map(lambda _: w, params), rest)(x)

    return run(product)


@pytest.mark.parametrize("kind", ["mxfp8", "mxfp4"])
def test_the_three_products_in_mx_blocks_are_qwixs_bit_for_bit(kind):
    """Qwix rounds scales up, as our "ceil" does."""
    for got, want in zip(ours(kind, scale_rounding="ceil"), theirs(kind, tile=32)):
        np.testing.assert_array_equal(got, want)


def test_int8_rows_err_as_qwixs_do():
    """Qwix takes another step for its levels, so values differ and errors do not."""
    got = np.linalg.norm(ours("int8")[0] - EXACT[0])
    want = np.linalg.norm(theirs("int8", backward=False)[0] - EXACT[0])
    assert got == pytest.approx(want, rel=0.02)
