"""The contract of every mixer: packed documents, axes, weight decay, errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from effarch.models import mixers
from effarch.models.context import Context

WIDTH, LENGTH = 32, 37


def rel_rms(x, y):
    return float(np.sqrt(np.mean((x - y) ** 2) / np.mean(y**2)))


def inputs(batch=2):
    return np.random.default_rng(1).standard_normal((batch, LENGTH, WIDTH), np.float32)


def test_packed_documents_equal_documents_alone(mixer):
    """Values and gradients: row 0 packs three documents (one of a token), rows 1 to 3 hold one each."""
    lengths = (11, 1, 20)
    starts = np.cumsum((0, *lengths))[:-1]
    x = np.zeros((4, LENGTH, WIDTH), np.float32)
    x[0] = inputs(1)[0]
    segments = np.zeros((4, LENGTH), np.int32)
    positions = np.zeros((4, LENGTH), np.int32)
    for number, (start, length) in enumerate(zip(starts, lengths), 1):
        segments[0, start : start + length] = number
        positions[0, start : start + length] = np.arange(length)
        x[number, :length] = x[0, start : start + length]
        segments[number, :length] = 1
        positions[number] = np.arange(LENGTH)
    ctx = Context(segment_ids=jnp.array(segments), positions=jnp.array(positions))
    weight = np.zeros_like(x)
    weight[0, : sum(lengths)] = inputs(2)[1, : sum(lengths)]

    def alone(packed):
        """What stands in row 0, moved to the rows of its documents."""
        rows = np.zeros_like(packed)
        for number, (start, length) in enumerate(zip(starts, lengths), 1):
            rows[number, :length] = packed[0, start : start + length]
        return rows

    @jax.jit
    def run(state, x, weight):
        def loss(state, x):
            y = nnx.merge(mixer.graphdef, state)(x, ctx)[0]
            return jnp.sum(y * weight), y

        return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(state, x)

    (_, y), (packed, x_packed) = run(mixer.state, x, weight)
    _, (separate, x_separate) = run(mixer.state, x, alone(weight))
    real = segments != 0
    assert rel_rms(alone(np.asarray(y))[1:][real[1:]], np.asarray(y)[1:][real[1:]]) < 1e-5
    assert rel_rms(alone(np.asarray(x_packed)), x_separate) < 1e-4
    for path, gradient in jax.tree_util.tree_leaves_with_path(separate):
        other = packed
        for key in path:
            other = other[key.key]
        assert rel_rms(other, gradient) < 1e-4, jax.tree_util.keystr(path)
        assert np.any(gradient != 0), f"{jax.tree_util.keystr(path)} has no gradient"


def test_every_array_is_a_variable_with_an_axis_name_a_dimension(mixer):
    variables = jax.tree.leaves(
        nnx.state(mixer.abstract), is_leaf=lambda node: isinstance(node, nnx.Variable)
    )
    for variable in variables:
        assert isinstance(variable, nnx.Variable)
        assert len(variable.get_metadata("logical")) == len(variable.shape)


def test_weight_decay_is_for_matrices_and_convolutions(mixer):
    for path, variable in nnx.to_flat_state(nnx.state(mixer.abstract)):
        is_weight = path[-1] == "kernel" or ("conv" in path and not path[-1].endswith("_bias"))
        ndim = len(variable.get_metadata("logical"))
        assert variable.get_metadata("decay", ndim >= 2) == is_weight, path


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
        ("kda", dict(head_dim=8, num_v_heads=3), "not a multiple of num_heads=4"),
        ("delta_net", dict(head_dim=24), "not a multiple of head_dim=24"),
        ("delta_net", dict(head_dim=8, qk_activation="gelu"), "qk_activation='gelu' is not known"),
        ("delta_net", dict(head_dim=8, qk_norm="sum"), "choose relu or elu"),
        ("hgrn2", dict(head_dim=24), "not a multiple of head_dim=24"),
        ("mamba2", dict(head_dim=48), "not a multiple of head_dim=48"),
        ("gla", dict(num_heads=3), "cannot be split into num_heads=3"),
        ("retnet", dict(num_heads=32), "even number of key channels"),
        ("linear_attention", dict(feature_map="relo"), "Did you mean 'relu'?"),
        ("latent_attention", dict(rope_dim=7), "rope_dim=7 must be even"),
        (
            "latent_attention",
            dict(rope_yarn=(8, 4, 1, 64)),
            "must be (factor, fast, slow, length, scale)",
        ),
    ],
)
def test_impossible_sizes_are_refused_in_words(kind, options, words):
    with pytest.raises(ValueError, match=kind) as error:
        mixers.KINDS[kind](WIDTH, **options, rngs=nnx.Rngs(0))
    assert words in str(error.value)
