"""Parameters and FLOPs of every mixer at published sizes, against formulas and published totals."""

import jax
import pytest
from flax import nnx

from effarch.models import mixers

#  kind, options, width, (parameters by formula)
PUBLISHED = {
    "delta_net": (dict(), 1024, lambda d: 4 * d**2 + d * 8 + 12 * d + 128),
    "gla": (dict(), 2048, lambda d: 4 * d**2 + 16 * d + 16 * d // 2 + d // 2 + 512),
    "hgrn": (dict(), 1024, lambda d: 4 * d**2 + d),
    "hgrn2": (dict(), 2048, lambda d: 4 * d**2 + d),
    "retnet": (dict(), 2048, lambda d: 8 * d**2 + 512),
    "linear_attention": (dict(), 1024, lambda d: 4 * d**2 + 128),
    "gated_delta_net": (  # Qwen3-Next
        dict(num_heads=16, num_v_heads=32, expand_v=1.0),
        2048,
        lambda d: d * (2 * 2048 + 3 * 4096) + 2 * d * 32 + 4 * (2 * 2048 + 4096) + 2 * 32 + 128,
    ),
    "kda": (
        dict(),
        2048,
        lambda d: (
            d * (2 * d + 2 * d)
            + d * 16
            + (d * 128 + 128 * d)
            + (d * 128 + 128 * d + d)
            + d
            + 16
            + 4 * 3 * d
            + 128
        ),
    ),
    "mamba2": (
        dict(),
        1024,
        lambda d: d * (4 * d + 2 * 128 + 32) + 5 * (2 * d + 2 * 128) + 3 * 32 + 2 * d + 2 * d * d,
    ),
    "latent_attention": (
        dict(),
        2048,
        lambda d: d * 16 * 192 + d * (512 + 64) + 512 + 512 * 16 * (128 + 128) + 16 * 128 * d,
    ),
    "attention": (dict(num_heads=32), 2048, lambda d: 4 * d**2),
    "spark_attention": (dict(num_heads=16, num_kv_heads=4), 2048, lambda d: 5 * d**2 // 2),
}


def abstract(kind, width, **options):
    return nnx.eval_shape(lambda: mixers.KINDS[kind](width, **options, rngs=nnx.Rngs(0)))


def parameters(mixer) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(mixer, nnx.Param)))


@pytest.mark.parametrize("kind", mixers.KINDS)
def test_parameters_follow_the_formula_to_the_digit(kind):
    options, width, formula = PUBLISHED[kind]
    assert parameters(abstract(kind, width, **options)) == formula(width)


@pytest.mark.parametrize(
    ("kind", "width", "depth", "hidden", "millions"),
    [
        ("delta_net", 1024, 24, 2816, 374),
        ("delta_net", 2048, 24, 5632, 1366),
        ("kda", 1024, 24, 2816, 387),
        ("kda", 2048, 24, 5632, 1391),
        ("gla", 1024, 24, 2816, 374),
        ("gla", 2048, 24, 5632, 1366),
        ("hgrn2", 1024, 24, 2816, 374),
        ("hgrn2", 2048, 24, 5632, 1364),
        ("retnet", 1024, 24, 1536, 380),
        ("retnet", 2048, 24, 2816, 1352),
        ("mamba2", 1024, 48, 0, 382),
        ("mamba2", 2048, 48, 0, 1372),
    ],
)
def test_totals_of_the_hybrid_studies(kind, width, depth, hidden, millions):
    """Vocabulary 32,000, untied; a block is mixer, GLU of width `hidden` (0: none) and norms."""
    ffn = 3 * width * hidden + width if hidden else 0
    block = parameters(abstract(kind, width)) + width + ffn
    assert round((depth * block + width + 2 * 32000 * width) / 1e6) == millions


@pytest.mark.parametrize(
    ("kind", "per_state", "state"),
    [
        ("delta_net", 6, 8 * 128 * 128),
        ("gated_delta_net", 7, 6 * 128 * 256),
        ("gla", 5, 4 * 128 * 256),
        ("hgrn", 2, 1024),
        ("hgrn2", 5, 8 * 128 * 128),
        ("kda", 7, 8 * 128 * 128),
        ("linear_attention", 4, 8 * 128 * 128),
        ("mamba2", 5, 32 * 128 * 64),
        ("retnet", 5, 8 * 128 * 256),
    ],
)
def test_recurrences_cost_a_multiple_of_their_state(kind, per_state, state):
    """2 FLOPs each to write and to read out, 2 to read before a delta write, 1 to decay; any length."""
    mixer = abstract(kind, 1024)
    assert mixer.forward_flops(512) == mixer.forward_flops(65536) == per_state * state
    cache = jax.tree.leaves(jax.eval_shape(lambda: mixer.init_cache(1, 512)["state"]))
    assert sum(leaf.size for leaf in cache) == state


@pytest.mark.parametrize(
    ("kind", "options", "state"),
    [
        ("delta_net", dict(), 262_144),
        ("gated_delta_net", dict(head_dim=256), 786_432),
        ("gla", dict(), 524_288),
        ("hgrn2", dict(), 262_144),
        ("kda", dict(), 262_144),
        ("mamba2", dict(), 524_288),
        ("retnet", dict(), 1_048_576),
    ],
)
def test_states_of_a_layer_of_the_published_1_3b_models(kind, options, state):
    cache = jax.eval_shape(lambda: abstract(kind, 2048, **options).init_cache(1, 4096)["state"])
    assert cache.size == state and cache.dtype == "float32"


def test_latent_attention_caches_576_numbers_a_token():
    mixer = abstract("latent_attention", 2048)
    cache = jax.eval_shape(lambda: mixer.init_cache(1, 100))
    del cache["positions"]
    assert sum(leaf.size for leaf in jax.tree.leaves(cache)) == 100 * 576
    assert mixer.forward_flops(4096) == 4096 * 16 * (192 + 128)


@pytest.mark.parametrize("kind", ["delta_net", "gated_delta_net", "kda", "mamba2"])
def test_short_convolutions_cost_two_flops_a_tap(kind):
    mixer = abstract(kind, 1024)
    channels = {"delta_net": 3072, "gated_delta_net": 3072, "kda": 3072, "mamba2": 2048 + 256}
    assert mixer.conv.forward_flops(512) == 2 * 4 * channels[kind]
    assert abstract(kind, 1024, conv_size=0).conv.forward_flops(512) == 0
