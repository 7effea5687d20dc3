"""The one product of the models: values, gradients, and what the CPU's compiler makes of it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effarch import config, config_check
from effarch.aot import hlo, plan
from effarch.parallel import mesh as mesh_lib
from effarch.quantization import matmul
from effarch.training import setup as setup_lib


@pytest.mark.parametrize(
    ("dtype", "shape", "tolerance"),
    [
        (jnp.float32, (2, 5), 1e-6),
        (jnp.bfloat16, (2, 5), 8e-3),
        (jnp.bfloat16, (3,), 8e-3),  # an odd number of rows
        (jnp.bfloat16, (), 8e-3),
    ],
)
def test_the_product_and_its_gradients(dtype, shape, tolerance):
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(*shape, 16)), rng.normal(size=(16, 24))
    g = rng.normal(size=(*shape, 24))

    @jax.jit
    def run(x, w, g):
        y, pullback = jax.vjp(lambda x, w: matmul.matmul(x, w, dtype=dtype), x, w)
        return y, *pullback(g)

    x_in, g_in = jnp.asarray(x, dtype), jnp.asarray(g, dtype)
    y, dx, dw = run(x_in, jnp.asarray(w, jnp.float32), g_in)
    assert (y.dtype, dx.dtype, dw.dtype) == (dtype, dtype, jnp.float32)
    rows, upstream = x.reshape(-1, 16), g.reshape(-1, 24)
    expected = (x @ w, g @ w.T, rows.T @ upstream)
    for got, want in zip((y, dx, dw), expected):
        error = np.asarray(got, np.float64) - want
        assert np.sqrt(np.mean(error**2) / np.mean(want**2)) < tolerance


def test_the_gradient_of_the_weights_keeps_float32():
    """1 + 2^-9 sums exactly in float32; rounded to bfloat16 it would be 1."""
    x = jnp.array([[1.0], [2.0**-9]], jnp.bfloat16)
    w = jnp.ones((1, 1), jnp.float32)
    dw = jax.jit(jax.grad(lambda w: jnp.sum(matmul.matmul(x, w, dtype=jnp.bfloat16))))(w)
    assert float(dw[0, 0]) == 1 + 2.0**-9


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="reads the CPU compiler's text")
def test_no_product_of_a_bfloat16_step_is_widened():
    """XLA:CPU multiplies in float32, unasked and 4 to 10 times slower, where a form does not suit it."""
    c = config.default()
    c.model.width, c.model.depth, c.model.vocab_size, c.model.dtype = 64, 1, 128, "bfloat16"
    c.model.blocks.attention.num_heads, c.model.blocks.glu.hidden = 2, 96
    c.data.tokenizer, c.data.seq_len, c.data.batch_size = "bytes", 160, 2
    c = config_check.finish(c, num_devices=1)
    mesh = mesh_lib.make(mesh_lib.resolve(c.mesh, 1))
    setup = setup_lib.on_mesh(c, mesh, vocab_size=c.model.vocab_size)
    program = hlo.parse(plan.lower(setup).compile().as_text())
    products = [
        [computation[name].shapes[0].dtype for name in instruction.operands]
        for instruction, computation, _ in program.instructions(fused=True)
        if instruction.opcode == "dot"
    ]
    assert len(products) > 20
    assert {dtype for operands in products for dtype in operands} == {"bf16"}
