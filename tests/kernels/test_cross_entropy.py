"""Fused projection and cross-entropy against optax on all logits."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from effarch.kernels import platform
from effarch.kernels.cross_entropy import xla
from effarch.kernels.cross_entropy.api import linear_cross_entropy

B, T, D, W = 3, 13, 8, 50

# Half the compile time, the same sums.
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def inputs(dtype=jnp.float32, gain=1.0):
    """x, a [W, D] embedding table whose transpose is the head, targets, weights (some are 0)."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((B, T, D)) * gain, dtype)
    table = jnp.asarray(rng.standard_normal((W, D)), dtype)
    targets = jnp.asarray(rng.integers(0, W, (B, T)), jnp.int32)
    weights = rng.uniform(0.5, 2, (B, T)) * (rng.uniform(size=(B, T)) > 0.3)
    return x, table, targets, jnp.asarray(weights, jnp.float32)


def dense(x, table, targets, weights, softcap=None, z_loss=0.0):
    """Total and cross-entropy of each token by optax, in float32."""
    logits = x.astype(jnp.float32) @ table.astype(jnp.float32).T
    if softcap is not None:
        logits = softcap * jnp.tanh(logits / softcap)
    ce = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    return jnp.sum(weights * (ce + z_loss * jax.nn.logsumexp(logits, -1) ** 2)), ce


def fused(x, table, targets, weights, **options):
    total, token = linear_cross_entropy(x, table.T, targets, weights, **options)
    return total, token["ce"]


def distance(x, y):
    """RMS of the difference relative to the RMS of y."""
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    return np.sqrt(np.sum((x - y) ** 2) / max(np.sum(y**2), 1e-30))


def compare(arrays, tolerance, options, **chunks_and_backend):
    grads = {"argnums": (0, 1, 3), "has_aux": True}

    def run(function, **options):
        return quick_jit(jax.value_and_grad(functools.partial(function, **options), **grads))

    (total, ce), expected = run(dense, **options)(*arrays)
    (our_total, our_ce), ours = run(fused, **options, **chunks_and_backend)(*arrays)
    assert distance(our_total, total) < tolerance
    assert distance(our_ce, ce) < tolerance
    for x, y, like in zip(ours, expected, (arrays[0], arrays[1], arrays[3])):
        assert x.dtype == like.dtype
        assert distance(x, y) < tolerance


CAPPED = {"softcap": 3.0, "z_loss": 0.1}


@pytest.mark.parametrize(
    ("chunk_size", "options"), [(None, {}), (1, CAPPED), (4, CAPPED), (100, CAPPED)]
)
def test_equals_optax(chunk_size, options):
    compare(inputs(), 2e-6, options, chunk_size=chunk_size, backend="xla")  # both float32


def test_reference_equals_optax():
    compare(inputs(), 2e-6, CAPPED, backend="reference")  # both float32


def test_bfloat16_is_near():
    # The gradient of the logits is rounded to 8 bits before its products, dx and d head after.
    compare(inputs(jnp.bfloat16), 5e-3, {"z_loss": 0.1}, chunk_size=4)


def test_huge_logits_are_safe():
    compare(inputs(gain=1e4), 2e-6, {}, chunk_size=4)  # both float32


def test_head_gradient_is_summed_in_float32():
    """1024 equal contributions, each far below half a bfloat16 step of their sum."""
    x = jnp.ones((1, 1024, 4), jnp.bfloat16)
    head = jnp.zeros((4, 2), jnp.bfloat16)
    targets, weights = jnp.zeros((1, 1024), jnp.int32), jnp.full((1, 1024), 1 / 1024)

    def total(head):
        return linear_cross_entropy(x, head, targets, weights, chunk_size=1)[0]

    grad = quick_jit(jax.grad(total))(head)
    np.testing.assert_allclose(np.asarray(grad, np.float32), [[-0.5, 0.5]] * 4, rtol=1e-6)


def test_targets_without_weight_may_be_anything():
    x, table, targets, weights = inputs()
    silly = jnp.where(weights == 0, jnp.asarray([-1, W, 2**31 - 1])[:, None], targets)
    assert not np.array_equal(silly, targets)
    run = quick_jit(jax.value_and_grad(lambda *a: fused(*a, z_loss=0.1)[0], (0, 1)))
    for x_, y_ in zip(
        jax.tree.leaves(run(x, table, silly, weights)),
        jax.tree.leaves(run(x, table, targets, weights)),
    ):
        assert np.array_equal(x_, y_)


@pytest.mark.parametrize("backend", ["xla", "reference"])
def test_values_of_tokens_carry_no_gradient(backend):
    x, table, targets, weights = inputs()

    def of_tokens(x):
        token = linear_cross_entropy(x, table.T, targets, weights, backend=backend)[1]
        return jnp.sum(token["ce"] + token["logsumexp"])

    assert np.all(np.asarray(quick_jit(jax.grad(of_tokens))(x)) == 0)


def test_log_sum_exp_of_each_token():
    x, table, targets, weights = inputs()
    run = quick_jit(functools.partial(linear_cross_entropy, chunk_size=5))
    token = run(x, table.T, targets, weights)[1]
    expected = np.log(np.sum(np.exp(np.asarray(x, np.float64) @ np.asarray(table.T)), -1))
    assert distance(token["logsumexp"], expected) < 1e-6  # float32


@pytest.mark.parametrize("backend", ["xla", "reference"])
def test_a_hit_is_a_token_whose_best_word_is_the_target(backend):
    x, table, targets, weights = inputs()
    best = np.argmax(np.asarray(x) @ np.asarray(table).T, axis=-1)
    targets = jnp.asarray(np.where(np.arange(T) % 2, best, targets))  # every second one is right
    run = quick_jit(functools.partial(linear_cross_entropy, backend=backend))
    hit = run(x, table.T, targets, weights)[1]["hit"]
    np.testing.assert_array_equal(hit, best == targets)
    assert 0 < hit.mean() < 1


def compiled(gradient, dtype, shape=(2, 32, 16, 96), chunk_size=8):
    rows, length, width, words = shape
    arguments = (
        jax.ShapeDtypeStruct((rows, length, width), dtype),
        jax.ShapeDtypeStruct((width, words), dtype),
        jax.ShapeDtypeStruct((rows, length), jnp.int32),
        jax.ShapeDtypeStruct((rows, length), jnp.float32),
    )

    def total(*a):
        return linear_cross_entropy(*a, chunk_size=chunk_size, backend="xla")[0]

    function = jax.grad(total, (0, 1)) if gradient else total
    return quick_jit(function).lower(*arguments).compile().as_text()


def test_logits_are_never_all_held():
    sizes = [
        math.prod(int(n) for n in dims.split(","))
        for dims in re.findall(r"\b[a-z]+\d+\[([\d,]+)\]", compiled(True, jnp.float32))
    ]
    assert 2 * 8 * 96 in sizes  # the logits of one chunk are
    assert max(sizes) < 2 * 32 * 96


def test_without_gradient_only_the_logits_are_computed():
    assert compiled(False, jnp.float32).count(" dot(") == 1
    assert compiled(True, jnp.float32).count(" dot(") == 3


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="about XLA:CPU")
@pytest.mark.parametrize("rows", [1, 2])
def test_bfloat16_products_are_not_widened(rows):
    """XLA:CPU silently runs a bfloat16 product of unfit layout in float32, many times slower."""
    hlo = compiled(True, jnp.bfloat16, shape=(rows, 256, 64, 512), chunk_size=64)
    found = []
    for computation in hlo.split("\n\n"):
        types = dict(re.findall(r"(%[\w.-]+) = (\w+)\[", computation))
        dots = re.findall(r" dot\((%[\w.-]+), (%[\w.-]+)\)", computation)
        found += [(types[x], types[y]) for x, y in dots]
    assert found == [("bf16", "bf16")] * 3


@pytest.mark.parametrize(
    ("kind", "words"), [("cpu", 1000), ("cpu", 200_000), ("tpu", 20_000), ("gpu", 200_000)]
)
def test_default_chunk_stays_within_its_budget(kind, words, monkeypatch):
    seen = []

    def spy(x, head, targets, weights, options):
        seen.append(options[2])
        return jnp.zeros(()), *[jnp.zeros(targets.shape)] * 3

    monkeypatch.setattr(xla, "_loss", spy)
    x, ids = jnp.zeros((4, 4096, 1)), jnp.zeros((4, 4096), jnp.int32)
    with platform.tracing_for(kind):
        linear_cross_entropy(x, jnp.zeros((1, words)), ids, ids.astype(jnp.float32))
    limit = max(xla._BUDGET[kind], xla._TOKENS * words)
    assert 0.8 * limit < 4 * seen[0] * words <= limit


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head": jnp.zeros((D + 1, W))}, "do not fit"),
        ({"targets": jnp.zeros((B, T))}, "targets is float32"),
        ({"weights": jnp.zeros((B, T + 1))}, "weights is"),
        ({"softcap": 0.0}, "softcap is 0.0"),
        ({"z_loss": -1.0}, "z_loss is -1.0"),
        ({"chunk_size": 0}, "chunk_size is 0"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    x, table, targets, weights = inputs()
    arguments = {"x": x, "head": table.T, "targets": targets, "weights": weights} | change
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(**arguments)
