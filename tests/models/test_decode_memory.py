"""What decoding keeps of the past: nothing that grows, unless a layer is full attention."""

import functools
import math

import jax
import pytest

from effarch import config
from effarch.models import build

pytestmark = pytest.mark.smoke

RECURRENT = ("delta_net", "gated_delta_net", "gla", "hgrn", "hgrn2", "kda")
RECURRENT += ("linear_attention", "mamba2", "retnet")


def cache_bytes(layers, length):
    c = config.default()
    c.model.width, c.model.depth, c.model.layers = 64, 4, layers
    for kind in ("delta_net", "hgrn2", "kda"):
        c.model.blocks[kind].head_dim = 32
    c.model.blocks.mamba2.update(head_dim=32, state_dim=32)
    c.model.blocks.local = config.block("attention", num_heads=2, window=64)
    c.model.blocks.attention.num_heads = 2
    model = build.abstract(c.model, vocab_size=64)
    cache = jax.eval_shape(functools.partial(model.init_cache, 1, length))
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(cache))


@pytest.mark.parametrize("mixer", RECURRENT)
def test_recurrent_models_keep_the_same_at_any_length(mixer):
    short, long = (cache_bytes(f"{mixer}/none", length) for length in (128, 16384))
    assert short == long > 0


def test_a_window_bounds_what_is_kept_and_full_attention_does_not():
    local = [cache_bytes("gla/none + local/none", length) for length in (128, 16384)]
    assert local[0] == local[1]
    pure = cache_bytes("gla/none", 128)
    hybrid = [cache_bytes("3*gla/none + attention/none", n) - 0.75 * pure for n in (128, 16384)]
    assert hybrid[1] / hybrid[0] == pytest.approx(128)
    # keys and values of 64 float32 channels and a position, per token
    assert hybrid[0] == 128 * (2 * 64 * 4 + 4)
