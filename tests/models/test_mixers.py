"""The contract of every mixer: packing, decoding, causality, axes, counts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from effarch.models import mixers
from effarch.models.context import Context

WIDTH, LENGTH = 32, 37
VARIANTS = {
    "attention": dict(num_heads=4),
    "attention_grouped": dict(num_heads=4, num_kv_heads=2, qk_norm=True, use_gate=True),
    "attention_window": dict(num_heads=2, window=5, rope_fraction=0.5),
    "attention_no_rope": dict(num_heads=2, rope=False, softcap=5.0),
    "gated_delta_net": dict(num_heads=2, head_dim=8),
    "gated_delta_net_shared": dict(num_heads=2, num_v_heads=4, head_dim=8, expand_v=1.0),
    "gated_delta_net_plain": dict(
        num_heads=2, head_dim=8, conv_size=0, use_gate=False, allow_neg_eigval=True
    ),
}


PLAIN = ("attention_grouped", "gated_delta_net_shared")
every_variant = pytest.mark.parametrize(
    "name",
    [
        name if name in PLAIN else pytest.param(name, marks=[pytest.mark.slow, pytest.mark.ci])
        for name in VARIANTS
    ],
)
"""The plain run takes one variant of each kind, the one with most options."""


@functools.cache
def make(name: str, dtype=jnp.float32):
    """Graph and state of a mixer."""
    kind = next(kind for kind in sorted(mixers.KINDS, key=len)[::-1] if name.startswith(kind))
    options = dict(VARIANTS[name], init_std=0.3, dtype=dtype)
    new = mixers.KINDS[kind]
    graphdef, _ = nnx.split(nnx.eval_shape(lambda: new(WIDTH, **options, rngs=nnx.Rngs(0))))
    init = jax.jit(lambda key: nnx.state(new(WIDTH, **options, rngs=nnx.Rngs(key))))
    return graphdef, init(jax.random.key(0))


def forward(parts, x, ctx=None, cache=None):
    @jax.jit
    def run(state, x, ctx, cache):
        y, cache, _ = nnx.merge(parts[0], state)(x, ctx, cache)
        return y, cache

    return run(nnx.to_pure_dict(parts[1]), x, ctx or Context(), cache)


def inputs(length=LENGTH, batch=1, seed=1):
    return jax.random.normal(jax.random.key(seed), (batch, length, WIDTH))


def rel_rms(x, y):
    return float(jnp.sqrt(jnp.mean((x - y) ** 2) / jnp.mean(y**2)))


@every_variant
def test_packed_documents_equal_separate_documents(name):
    """Values and gradients, with a document of one token and padding at the end."""
    parts = make(name)
    lengths = (11, 1, 20)
    x = inputs(sum(lengths) + 5)
    weight = jax.random.normal(jax.random.key(2), x.shape)
    bounds = np.cumsum((0, *lengths))
    segments = np.repeat([1, 2, 3, 0], (*lengths, 5))[None]
    positions = np.concatenate([np.arange(n) for n in (*lengths, 5)])[None]

    def run(state, x, ctx):
        return nnx.merge(parts[0], state)(x, ctx)[0]

    def packed(state, x):
        y = run(state, x, Context(segment_ids=jnp.array(segments), positions=jnp.array(positions)))
        return jnp.sum((y * weight)[:, : bounds[-1]]), y

    def separate(state, x):
        ys = [run(state, x[:, a:b], Context()) for a, b in zip(bounds[:-1], bounds[1:])]
        y = jnp.concatenate(ys, axis=1)
        return jnp.sum(y * weight[:, : bounds[-1]]), y

    state = nnx.to_pure_dict(parts[1])

    def with_gradients(function):
        return jax.jit(jax.value_and_grad(function, argnums=(0, 1), has_aux=True))(state, x)

    (_, got), got_grads = with_gradients(packed)
    (_, want), want_grads = with_gradients(separate)
    assert rel_rms(got[:, : bounds[-1]], want) < 1e-5
    for path, grad in jax.tree_util.tree_leaves_with_path(want_grads):
        other = got_grads
        for key in path:
            other = other[getattr(key, "key", getattr(key, "idx", None))]
        assert rel_rms(other, grad) < 1e-4, jax.tree_util.keystr(path)


@every_variant
def test_prefill_then_decode_equals_the_whole(name):
    """Rows of different lengths: the shorter prompt is padded at its end."""
    parts = make(name)
    x = inputs(batch=2)
    want, _ = forward(parts, x)
    prompts = np.array([20, 13])
    cache = nnx.merge(*parts).init_cache(2, LENGTH)
    offset = np.arange(20)
    ctx = Context(
        segment_ids=jnp.array(offset < prompts[:, None], jnp.int32),
        positions=jnp.array(np.tile(offset, (2, 1)), jnp.int32),
    )
    got, cache = forward(parts, x[:, :20], ctx, cache)
    assert rel_rms(got[0], want[0, :20]) < 1e-5
    assert rel_rms(got[1, :13], want[1, :13]) < 1e-5

    @jax.jit
    def step(state, token, positions, cache):
        y, cache, _ = nnx.merge(parts[0], state)(token, Context(positions=positions), cache)
        return y, cache

    state = nnx.to_pure_dict(parts[1])
    for count in range(17):
        place = prompts + count
        token = jnp.stack([x[row, place[row]] for row in range(2)])[:, None]
        y, cache = step(state, token, jnp.array(place, jnp.int32)[:, None], cache)
        for row in range(2):
            assert rel_rms(y[row, 0], want[row, place[row]]) < 1e-5, (count, row)


@every_variant
def test_no_output_sees_a_later_token(name):
    parts = make(name)
    x = inputs()
    changed = x.at[0, 25].add(1.0)
    before, after = forward(parts, x)[0], forward(parts, changed)[0]
    np.testing.assert_array_equal(before[0, :25], after[0, :25])
    assert float(jnp.abs(before[0, 25] - after[0, 25]).max()) > 1e-3


@every_variant
def test_bfloat16_stays_near_float32(name):
    x = inputs()
    y = {}
    for dtype in (jnp.float32, jnp.bfloat16):
        y[dtype] = forward(make(name, dtype), x.astype(dtype))[0]
        assert y[dtype].dtype == dtype
    # Eight bits of mantissa through five products, some of them of near-cancelling sums.
    assert rel_rms(y[jnp.bfloat16].astype(jnp.float32), y[jnp.float32]) < 3e-2


@every_variant
def test_every_array_is_a_variable_with_an_axis_name_a_dimension(name):
    _, state = make(name)
    for variable in jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, nnx.Variable)):
        assert isinstance(variable, nnx.Variable)
        assert len(variable.get_metadata("logical")) == variable[...].ndim


def test_a_sliding_window_cache_does_not_grow():
    attention = mixers.KINDS["attention"](WIDTH, num_heads=2, window=8, rngs=nnx.Rngs(0))
    assert attention.init_cache(1, 1000)["k"].shape == (1, 8, 2, 16)


@pytest.mark.parametrize(
    ("kind", "options", "words"),
    [
        ("attention", dict(num_heads=4, num_kv_heads=3), "not a multiple of num_kv_heads=3"),
        ("attention", dict(num_heads=5), "not a multiple of num_heads=5"),
        ("attention", dict(num_heads=4, head_dim=7), "even number of channels"),
        ("attention", dict(num_heads=4, window=0), "window=0 must be at least 1"),
        ("gated_delta_net", dict(num_heads=2, num_v_heads=3), "not a multiple of num_heads=2"),
    ],
)
def test_impossible_sizes_are_refused_in_words(kind, options, words):
    with pytest.raises(ValueError, match=kind) as error:
        mixers.KINDS[kind](WIDTH, **options, rngs=nnx.Rngs(0))
    assert words in str(error.value)
