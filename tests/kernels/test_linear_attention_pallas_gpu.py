"""Linear attention's GPU kernels, run by the interpreter and judged by the recurrence in float64.

Memory that nothing has written reads as NaN there. The delta rule's test shares the parts around the
kernels; here is what is different.
"""

import jax
import numpy as np
import pytest

from effarch.kernels import dispatch, linear_attention
from effarch.kernels.linear_attention import pallas_gpu

B, T, H, HV, K, V, CHUNK = 2, 77, 1, 2, 24, 40, 32
# Padding in front, between and behind, documents of one token (also with an id that came before), a
# boundary on the edge of chunks (64), a document over two chunks.
SEGMENTS = np.array(
    [
        [0] * 2 + [7] * 5 + [3] + [7] + [0] * 3 + [4] * 20 + [2] * 20 + [1] + [9] * 20 + [0] * 4,
        [5] * 64 + [6] * 13,
    ],
    np.int32,
)
CHANNEL = pytest.param("channel", marks=[pytest.mark.slow, pytest.mark.ci])


def make_inputs(kind, gate, sizes=(B, T, H, HV, K, V)):
    """q, k, v, g (not for "none") and a state, float32."""
    batch, length, heads, value_heads, key, value = sizes
    rng = np.random.default_rng(0)
    q, k = rng.standard_normal((2, batch, length, heads, key)) / key**0.5
    v = rng.standard_normal((batch, length, value_heads, value))
    state = rng.standard_normal((batch, value_heads, key, value))
    gates = (batch, length, value_heads, key)
    g = {
        "random": -np.exp(rng.standard_normal(gates) - 1.5),
        "strong decay": np.full(gates, -20.0),
        "mixed decay": rng.choice([0.0, -0.01, -1.0, -20.0, -1e4], size=gates),
    }[kind]
    g = dict(none=[], head=[g[..., 0]], channel=[g])[gate]
    return tuple(x.astype(np.float32) for x in (q, k, v, *g, state))


def on_gpu(q, k, v, g=None, state=None, *, segments=None, chunk_size=CHUNK):
    options = dict(initial_state=state, segment_ids=segments, chunk_size=chunk_size)
    scale = q.shape[-1] ** -0.5
    return pallas_gpu.linear_attention(q, k, v, g, scale=scale, interpret=True, **options)


def recurrence(q, k, v, g=None, state=None, *, segments=None):
    options = dict(initial_state=state, segment_ids=segments, backend="reference")
    return linear_attention(q, k, v, g, **options)


@pytest.fixture(scope="module")
def trial(kernel_trial):
    names = ("q", "k", "v", "g", "initial_state")
    return kernel_trial(names, on_gpu, recurrence, SEGMENTS)


def check_float32(trial, kind, gate):
    """Documents, padding, an entering state, two value heads a key head, a last chunk half full."""
    inputs = make_inputs(kind, gate)
    found = trial.packed(*inputs)
    trial.assert_close(found, trial.judge(inputs), 1e-5)
    return inputs, found


@pytest.mark.parametrize("gate", ["head", CHANNEL])
def test_float32_equals_the_recurrence_and_padding_is_ignored(trial, gate):
    """Two runs, the second with other numbers at padding, are equal to the bit."""
    (*inputs, state), first = check_float32(trial, "random", gate)
    padding = SEGMENTS == 0
    masks = [padding.reshape(*padding.shape, *(1,) * (x.ndim - 2)) for x in inputs]
    spoilt = [np.where(mask, np.float32(-99), x) for mask, x in zip(masks, inputs)]
    jax.tree.map(np.testing.assert_array_equal, trial.packed(*spoilt, state), first)
    for name in ("o", *trial.names[:-1]):
        assert np.all(np.asarray(first[name])[padding] == 0), name


@pytest.mark.parametrize("gate", ["head", CHANNEL])
@pytest.mark.parametrize("kind", ["strong decay", "mixed decay"])
def test_extreme_decays(trial, kind, gate):
    check_float32(trial, kind, gate)


@pytest.mark.slow
@pytest.mark.parametrize("gate", ["none", "head", "channel"])
@pytest.mark.parametrize(
    ("sizes", "chunk"),
    [((1, 50, 2, 2, 16, 16), 16), ((2, 40, 2, 4, 20, 70), 32), ((1, 130, 1, 1, 128, 128), None)],
)
def test_other_sizes_without_documents(trial, sizes, chunk, gate):
    """Nor an entering state."""
    inputs = make_inputs("random", gate, sizes)[:-1]

    def run(*inputs):
        return on_gpu(*inputs, chunk_size=chunk)

    actual, expected = trial.compiled(run)(*inputs), trial.judge(inputs, trial.compiled(recurrence))
    trial.assert_close(actual, expected, 1e-5)


@pytest.mark.slow
def test_bfloat16(trial, gate):
    trial.check_bfloat16(make_inputs("random", gate), 6e-3, kept=2)


@pytest.mark.slow
def test_documents_without_decay(trial):
    *inputs, state = make_inputs("random", "none")

    def packed(rule):
        return trial.compiled(lambda q, k, v, s: rule(q, k, v, None, s, segments=SEGMENTS))

    inputs = (*inputs, state)
    actual, expected = packed(on_gpu)(*inputs), trial.judge(inputs, packed(recurrence))
    trial.assert_close(actual, expected, 1e-5)


@pytest.mark.slow
def test_scan_checkpoint_and_splitting(trial):
    """Two layers by scan, recomputed in the backward pass; a row cut in two, the state carried."""
    q, k, v, g, state = make_inputs("random", "head")

    def gradient(rule):
        def layer(v, _):
            return rule(q, k, v, g)[0], None

        def loss(v):
            return jax.lax.scan(jax.checkpoint(layer), v, length=2)[0].sum()

        return jax.jit(jax.grad(loss))(v)

    trial.assert_close(dict(v=gradient(on_gpu)), dict(v=gradient(recurrence)), 1e-5)
    run = jax.jit(on_gpu)
    o, final = run(q, k, v, g, state)
    head, tail = ([x[:, own] for x in (q, k, v, g)] for own in (slice(50), slice(50, None)))
    o_head, middle = run(*head, state)
    o_tail, last = run(*tail, middle)
    joined = dict(o=np.concatenate([o_head, o_tail], 1), final=last)
    trial.assert_close(joined, dict(o=o, final=final), 2e-6)


def test_what_the_kernels_do_not_treat_is_refused():
    inputs = make_inputs("random", "head")[:4]
    with pytest.raises(dispatch.Unsupported, match=r"'pallas_gpu'.*runs on GPUs.* for cpu"):
        linear_attention(*inputs, backend="pallas_gpu")
    wide = np.zeros((B, T, H, 200), np.float32)
    with pytest.raises(dispatch.Unsupported, match="heads of 200 keys are wider than 128"):
        on_gpu(wide, wide, *inputs[2:])
    with jax.enable_x64(True), pytest.raises(dispatch.Unsupported, match="float64"):
        on_gpu(*(np.float64(x) for x in inputs))
