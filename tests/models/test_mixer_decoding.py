"""The contract of every mixer: prompt then tokens one by one, causality, narrow numbers, cache sizes."""

import jax
import jax.numpy as jnp
import numpy as np

from effarch.models import mixers
from effarch.models.context import Context

WIDTH, LENGTH, PROMPT = 32, 84, 20


def rel_rms(x, y):
    return float(np.sqrt(np.mean((x - y) ** 2) / np.mean(y**2)))


def inputs():
    return np.random.default_rng(1).standard_normal((2, LENGTH, WIDTH), np.float32)


def test_prefill_then_decode_equals_the_whole(mixer):
    """Rows of different lengths: the shorter prompt is padded at its end."""
    x = inputs()
    want = np.asarray(mixer.forward(x)[0])
    prompts = np.array([PROMPT, 13])
    offset = np.arange(PROMPT)
    ctx = Context(
        segment_ids=jnp.array(offset < prompts[:, None], jnp.int32),
        positions=jnp.array(np.tile(offset, (2, 1)), jnp.int32),
    )
    y, cache = mixer.forward(x[:, :PROMPT], ctx, mixer.init_cache(2, LENGTH))
    for row, length in enumerate(prompts):
        assert rel_rms(np.asarray(y)[row, :length], want[row, :length]) < 1e-5
    rows = np.arange(2)
    for count in range(LENGTH - PROMPT):
        place = prompts + count
        ctx = Context(positions=jnp.array(place, jnp.int32)[:, None])
        y, cache = mixer.forward(x[rows, place][:, None], ctx, cache)
        assert rel_rms(np.asarray(y)[:, 0], want[rows, place]) < 1e-5, count


def test_no_output_sees_a_later_token(mixer):
    x = inputs()
    changed = x.copy()
    changed[0, 25] += 1.0
    before, after = (np.asarray(mixer.forward(y)[0]) for y in (x, changed))
    np.testing.assert_array_equal(before[0, :25], after[0, :25])
    np.testing.assert_array_equal(before[1], after[1])
    assert np.abs(before[0, 25] - after[0, 25]).max() > 1e-3


def test_bfloat16_stays_near_float32(mixer):
    x = inputs()
    wide, narrow = (mixer.forward(jnp.asarray(x, dtype))[0] for dtype in ("float32", "bfloat16"))
    assert wide.dtype == jnp.float32 and narrow.dtype == jnp.bfloat16
    # Eight bits of mantissa through five products, some of them of near-cancelling sums.
    assert rel_rms(np.asarray(narrow, np.float32), np.asarray(wide)) < 3e-2


def test_only_the_cache_of_softmax_attention_grows(mixer):
    short, long = (
        jax.tree.map(lambda x: x.shape, mixer.init_cache(2, length)) for length in (64, 4096)
    )
    softmax = mixer.kind in ("attention", "latent_attention", "spark_attention")
    assert (short != long) == (softmax and "window" not in mixer.options)


def test_every_registered_kind_runs_through_these_tests(tested_kinds):
    assert tested_kinds == set(mixers.KINDS)
