"""The grouped matrix product against a loop over groups: values, gradients, empty and full groups."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effarch.kernels import grouped_matmul
from effarch.kernels.grouped_matmul import blocks
from effarch.kernels.grouped_matmul.api import grouped_feed_forward

M, D, F, E = 48, 6, 5, 4
SIZES = {
    "all": [10, 20, 1, 17],
    "empty": [0, 30, 0, 18],
    "one full": [0, 0, M, 0],
    "tail": [7, 0, 9, 3],
    "none": [0, 0, 0, 0],
}


def make_inputs(rows=M):
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    return draw(rows, D), draw(E, D, F), draw(rows, F)


def by_groups(x, w, g, sizes):
    """y and the gradients of sum(y * g) with respect to x and w, one group at a time in float64."""
    x, w, g = (np.asarray(array, np.float64) for array in (x, w, g))
    y, dx, dw = np.zeros((len(x), w.shape[2])), np.zeros_like(x), np.zeros_like(w)
    start = 0
    for e, size in enumerate(sizes):
        own = slice(start, start + size)
        y[own], dx[own], dw[e] = x[own] @ w[e], g[own] @ w[e].T, x[own].T @ g[own]
        start += size
    return y, dx, dw


@functools.partial(jax.jit, static_argnames=("backend", "aligned"))
def run(x, w, g, sizes, *, backend="xla", aligned=1):
    def product(x, w):
        return grouped_matmul(x, w, sizes, aligned=aligned, backend=backend)

    y, pull = jax.vjp(product, x, w)
    return y, *pull(g.astype(y.dtype))


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("backend", ["xla", "reference"])
def test_values_and_gradients_equal_a_loop_over_groups(backend, sizes):
    inputs = make_inputs()
    actual = run(*inputs, np.array(sizes, np.int32), backend=backend)
    for a, b in zip(actual, by_groups(*inputs, sizes)):
        np.testing.assert_allclose(a, b, atol=3e-6)
        assert np.all(np.asarray(a)[b == 0] == 0)  # tail rows and empty groups: exactly


def test_rows_that_are_laid_out_in_blocks():
    """Groups padded to multiples of 8 with zeros give what they give without padding."""
    x, w, g = make_inputs(rows=64)
    filled, padded = [3, 0, 17, 8], [8, 0, 24, 8]
    keep = np.concatenate([np.arange(0, 3), np.arange(8, 25), np.arange(32, 40)])
    x[np.setdiff1d(np.arange(64), keep)] = 0
    y, dx, dw = run(x, w, g, np.array(padded, np.int32), aligned=8)
    want_y, want_dx, want_dw = by_groups(x[keep], w, g[keep], filled)
    np.testing.assert_allclose(y[keep], want_y, atol=3e-6)
    np.testing.assert_allclose(dx[keep], want_dx, atol=3e-6)
    np.testing.assert_allclose(dw, want_dw, atol=1e-5)


def test_bfloat16_is_summed_in_float32():
    sizes = np.array(SIZES["tail"], np.int32)
    x, w, g = (jnp.asarray(array, jnp.bfloat16) for array in make_inputs())
    y, dx, dw = run(x, w, g, sizes)
    assert y.dtype == dx.dtype == dw.dtype == jnp.bfloat16
    for a, b in zip((y, dx, dw), by_groups(x, w, g, sizes)):
        np.testing.assert_allclose(a.astype(np.float32), b, rtol=2**-8, atol=1e-6)


def test_the_work_does_not_grow_with_the_number_of_groups():
    """Rows that blocks multiply, their own and those of others: few more than there are."""

    @jax.jit
    def multiplied(sizes):
        def visit(block, counts):
            own = block.is_own_R1
            return counts[0] + own.size, counts[1] + jnp.sum(own)

        return blocks.over(visit, (0, 0), sizes, 8192, 1)

    rng = np.random.default_rng(0)
    for num_groups in (8, 32, 128):
        sizes = rng.multinomial(8192, np.full(num_groups, 1 / num_groups))
        everything, own = multiplied(sizes)
        assert own == 8192
        assert everything < 1.35 * 8192
    everything, own = multiplied(np.array([0] * 127 + [8192]))
    assert own == 8192 and everything < 1.05 * 8192

    def every_row_times_every_matrix(backend):
        lowered = run.lower(*make_inputs(), np.array(SIZES["all"]), backend=backend)
        return f"tensor<{M}x{E}x{F}xf32>" in lowered.as_text()

    assert every_row_times_every_matrix("reference")
    assert not every_row_times_every_matrix("xla")


def test_bfloat16_rows_are_not_made_float32():
    """What XLA does for CPUs if a loop slices bfloat16; it costs more than the products."""
    x, w, g = (jnp.asarray(array, jnp.bfloat16) for array in make_inputs())
    compiled = run.lower(x, w, g, np.array(SIZES["all"])).compile().as_text()
    for shape in (x.shape, g.shape):
        assert f"f32[{shape[0]},{shape[1]}]" not in compiled


def feed_forwards(x, w_in, w_out, g, sizes):
    """y and the gradients of sum(y * g), one group at a time in float64; silu is the activation."""
    x, g, w_out, *w_in = (np.asarray(array, np.float64) for array in (x, g, w_out, *w_in))
    y, dx, *dw = (np.zeros_like(array) for array in (x, x, *w_in, w_out))
    start = 0
    for e, size in enumerate(sizes):
        own = slice(start, start + size)
        first, *second = (x[own] @ w[e] for w in w_in)
        s = 1 / (1 + np.exp(-first))
        act, slope = first * s, s * (1 + first * (1 - s))
        h, dh = act * (second[0] if second else 1), g[own] @ w_out[e].T
        y[own] = h @ w_out[e]
        parts = [dh * slope * second[0], dh * act] if second else [dh * slope]
        dx[own] = sum(part @ w[e].T for part, w in zip(parts, w_in))
        for total, part in zip(dw, parts):
            total[e] = x[own].T @ part
        dw[-1][e] = h.T @ g[own]
        start += size
    return y, dx, *dw


@functools.partial(jax.jit, static_argnames=("backend", "aligned"))
def run_feed_forwards(x, w_in, w_out, g, sizes, *, backend="xla", aligned=1):
    def apply(x, w_in, w_out):
        return grouped_feed_forward(
            x, w_in, w_out, sizes, jax.nn.silu, aligned=aligned, backend=backend
        )

    y, pull = jax.vjp(apply, x, w_in, w_out)
    dx, dw_in, dw_out = pull(g.astype(y.dtype))
    return y, dx, *dw_in, dw_out


def feed_forward_inputs(num_in, rows=M):
    rng = np.random.default_rng(1)
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    return draw(rows, D), [draw(E, D, F) for _ in range(num_in)], draw(E, F, D), draw(rows, D)


@pytest.mark.parametrize("num_in", [1, 2])
@pytest.mark.parametrize("backend", ["xla", "reference"])
def test_feed_forwards_equal_a_loop_over_groups(backend, num_in):
    inputs = feed_forward_inputs(num_in)
    for sizes in SIZES.values():
        actual = run_feed_forwards(*inputs, np.array(sizes, np.int32), backend=backend)
        for a, b in zip(actual, feed_forwards(*inputs, sizes)):
            np.testing.assert_allclose(a, b, atol=4e-5)  # of values up to 60
            assert np.all(np.asarray(a)[b == 0] == 0)  # tail rows and empty groups: exactly


def test_feed_forwards_on_bfloat16_rows():
    """Rows in bfloat16, matrices in float32, whose gradients are float32 sums over several blocks."""
    x, w_in, w_out, g = feed_forward_inputs(2, rows=600)
    x, g = (jnp.asarray(array, jnp.bfloat16) for array in (x, g))
    sizes = [0, 500, 60, 0]
    actual = run_feed_forwards(x, w_in, w_out, g, np.array(sizes, np.int32))
    assert [a.dtype for a in actual] == [jnp.bfloat16] * 2 + [jnp.float32] * 3
    for a, b in zip(actual, feed_forwards(x, w_in, w_out, g, sizes)):
        a = np.asarray(a, np.float64)
        # Operands have eight bits; errors of products of a few of them add up like random steps.
        assert np.abs(a - b).max() < 0.02 * np.abs(b).max()
        assert np.all(a[b == 0] == 0)


def test_inside_scan_remat_and_vmap():
    x, w, g = make_inputs()
    sizes = np.array(SIZES["empty"], np.int32)

    @jax.jit
    def stacked(x, w):
        def layer(total, w):
            y = jax.checkpoint(grouped_matmul)(x, w, sizes)
            return total + jnp.sum(y * g), None

        return jax.lax.scan(layer, 0.0, w)[0]

    both = np.stack([w, 2 * w])
    total, (dx, dw) = jax.value_and_grad(stacked, argnums=(0, 1))(x, both)
    y, want_dx, want_dw = by_groups(x, w, g, sizes)
    np.testing.assert_allclose(total, 3 * np.sum(y * g), rtol=1e-5)
    np.testing.assert_allclose(dx, 3 * want_dx, atol=1e-5)
    np.testing.assert_allclose(dw, np.stack([want_dw, want_dw]), atol=1e-5)
    mapped = jax.jit(jax.vmap(lambda w: grouped_matmul(x, w, sizes)))(both)
    np.testing.assert_allclose(mapped, np.stack([y, 2 * y]), atol=1e-5)


def test_inside_shard_map():
    """Manual over a mesh axis with checks on: rows and sizes split, matrices whole."""
    x, w, g = make_inputs()
    sizes = np.array(SIZES["tail"], np.int32)
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    split, whole = jax.sharding.PartitionSpec("data"), jax.sharding.PartitionSpec()

    @jax.jit
    @functools.partial(jax.grad, argnums=(0, 1))
    def gradients(x, w):
        product = jax.shard_map(
            grouped_matmul, mesh=mesh, in_specs=(split, whole, split), out_specs=split
        )
        return jnp.sum(product(x, w, sizes) * g)

    for a, b in zip(gradients(x, w), by_groups(x, w, g, sizes)[1:]):
        np.testing.assert_allclose(a, b, atol=3e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(x=jnp.zeros((2, 3, 6))), r"x \(2, 3, 6\) and w \(4, 6, 5\) do not fit"),
        (dict(w=jnp.zeros((4, 5, 5))), r"do not fit; give x \[M,D\]"),
        (dict(group_sizes=jnp.zeros(3, int)), r"group_sizes is int32\[3\].*\[4\]"),
        (dict(group_sizes=jnp.zeros(4)), "group_sizes is float32"),
        (dict(aligned=7), "aligned=7 does not divide the 48 rows"),
        (dict(backend="cuda"), "backend 'cuda' does not exist"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    x, w, _ = make_inputs()
    arguments = dict(x=x, w=w, group_sizes=jnp.zeros(E, int)) | change
    with pytest.raises(ValueError, match=message):
        grouped_matmul(**arguments)


def test_wrong_weights_of_feed_forwards_are_named():
    x, w_in, w_out, _ = feed_forward_inputs(2)
    for wrong in ((w_in + w_in[:1], w_out), (w_in, w_out[:, :2]), ([w_in[0], w_in[1][:2]], w_out)):
        with pytest.raises(ValueError, match=r"do not fit x \(48, 6\); give one or two matrices"):
            grouped_feed_forward(x, *wrong, jnp.zeros(E, int), jax.nn.silu)
