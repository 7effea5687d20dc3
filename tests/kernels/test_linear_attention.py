"""Linear attention: golden files, the chunked form, its gradient and the public contract.

Most comparisons run in float64, where the chunked form and a plain loop agree to 1e-12 and every wrong
factor shows. What the delta rule must do as well is in test_chunked_recurrences.py.
"""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effarch.kernels import linear_attention, linear_attention_step

DATA = Path(__file__).parents[1] / "data"
BACKENDS = ["reference", "xla"]
CI = [pytest.mark.slow, pytest.mark.ci]
GATES = ["none", "constant", "head", "channel"]


@pytest.fixture
def op(linear):
    return linear


def by_loops(q, k, v, g, state, segments):
    """The definition in NumPy, one row, token and head at a time."""
    (H, K), HV = q.shape[2:], v.shape[2]
    g = np.zeros(HV) if g is None else g
    g = g if g.ndim > 1 else np.broadcast_to(g, v.shape[:3])
    o, state = np.zeros_like(v), state.copy()
    for row in range(len(v)):
        document = 0
        for t in range(v.shape[1]):
            segment = segments[row, t]
            if segment == 0:
                continue
            if document not in (0, segment):
                state[row] = 0
            document = segment
            for head in range(HV):
                key, query = (x[row, t, head // (HV // H)] for x in (k, q))
                decay = np.exp(g[row, t, head] * np.ones(K))
                new = decay[:, None] * state[row, head] + np.outer(key, v[row, t, head])
                state[row, head] = new
                o[row, t, head] = new.T @ query * K**-0.5
    return o, state


@pytest.mark.smoke
@pytest.mark.parametrize("backend", ["xla", pytest.param("reference", marks=CI)])
@pytest.mark.parametrize("name", ["gla", "simple_gla", "retention"])
def test_golden_outputs(name, backend, relative_rms):
    for number in (0, 1):
        data = np.load(DATA / f"{name}_{number}.npz")
        g = data.get("g")
        if name == "retention":
            g = np.log1p(-(2.0 ** -(5.0 + np.arange(data["v"].shape[2])))).astype(np.float32)
        o, final = jax.jit(functools.partial(linear_attention, backend=backend))(
            *(data["q"], data["k"], data["v"], g),
            scale=float(data["scale"]),
            initial_state=data.get("initial_state"),
        )
        assert o.dtype == final.dtype == jnp.float32
        assert relative_rms(o, data["o"]) <= 1e-5
        if "final_state" in data:
            assert relative_rms(final, data["final_state"]) <= 1e-5


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("gate", "o_last", "o_sum", "state"),
    [
        ("none", (2.032213, -0.201960), 2.320960, (-2.128738, 0.148924, 2.935477, -0.503441)),
        ("head", (2.485320, 0.514760), 4.113549, (-2.843730, -0.821650, 2.777427, -0.211234)),
        ("channel", (2.494482, 0.486448), 4.022752, (-2.843730, -0.821650, 2.823107, -0.352384)),
    ],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_five_tokens_computed_by_hand(five_tokens, backend, gate, o_last, o_sum, state):
    (q, k, v, _), gates = five_tokens
    attend = jax.jit(functools.partial(linear_attention, backend=backend))
    o, final = jax.tree.map(np.asarray, attend(q, k, v, gates[gate]))
    np.testing.assert_allclose(o[0, -1, 0], o_last, atol=2e-6)
    np.testing.assert_allclose(np.sum(o), o_sum, atol=5e-6)
    np.testing.assert_allclose(np.ravel(final), state, atol=2e-6)


@pytest.mark.parametrize(
    "gate",
    ["none", "channel", *(pytest.param(x, marks=pytest.mark.slow) for x in ("constant", "head"))],
)
def test_values_equal_loops_and_gradients_equal_the_recurrence(op, float64, gate):
    inputs = op.inputs(gate)
    expected, gradients = op.forward_backward(*inputs, segments=op.SEGMENTS, backend="reference")
    op.assert_close(tuple(expected), by_loops(*inputs, op.SEGMENTS), 1e-12)
    op.assert_close(
        op.forward_backward(*inputs, segments=op.SEGMENTS), (expected, gradients), 1e-12
    )


SLOW = [pytest.mark.slow, pytest.mark.ci]


@pytest.mark.parametrize(
    ("gate", "sizes"),  # 1 is in effect 16, 50 is 64; the other tests have chunks of 32
    [
        ("head", (1, 128)),
        ("channel", (50,)),
        pytest.param("none", (16, 64, 128), marks=SLOW),
        pytest.param("constant", (16, 64, 128), marks=SLOW),
        pytest.param("head", (64,), marks=SLOW),
        pytest.param("channel", (16, 128), marks=SLOW),
    ],
)
def test_without_documents_at_every_chunk_size(op, float64, gate, sizes):
    inputs = op.inputs(gate)
    expected = by_loops(*inputs, op.ONE_DOCUMENT)
    for chunk_size in sizes:
        op.assert_close(op.forward(*inputs, chunk_size=chunk_size), expected, 1e-12)


@pytest.mark.parametrize("gate", GATES)
def test_steps_equal_the_whole_row(op, gate):
    q, k, v, g, state = op.inputs(gate, np.float32)
    step = op.compiled(linear_attention_step)
    after, outputs = state, []
    for t in range(op.T):
        gate_t = g if g is None or g.ndim == 1 else g[:, t]
        o, after = step(after, q[:, t], k[:, t], v[:, t], gate_t)
        outputs.append(o)
    expected = by_loops(q, k, v, g, state, op.ONE_DOCUMENT)
    op.assert_close((np.stack(outputs, 1), after), expected, 2e-6)


def test_tokens_that_write_nothing(op):
    """k = 0, no decay: the state stays as it is, bit for bit."""
    q, k, v, g, state = op.inputs("channel", np.float32)
    (_, final), _ = op.forward_backward(q, np.zeros_like(k), v, np.zeros_like(g), state)
    np.testing.assert_array_equal(final, state)


def test_bfloat16_inputs(op, relative_rms):
    q, k, v, g, state = op.inputs("head", np.float32)
    rounded = [x.astype(jnp.bfloat16) for x in (q, k, v)]
    o, final = op.forward(*rounded, g, state)
    assert o.dtype == jnp.bfloat16 and final.dtype == jnp.float32
    wide = (np.float64(x) for x in rounded)
    o_wide, final_wide = by_loops(*wide, g, np.float64(state), op.ONE_DOCUMENT)
    assert relative_rms(final, final_wide) <= 1e-6  # computed in float32
    assert relative_rms(o, o_wide) <= 3e-3  # o itself is rounded to 8 bits


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(v=jnp.zeros((1, 3, 3, 4))), "v has 3 heads.*multiple of the 2 heads"),
        (dict(k=jnp.zeros((1, 3, 2, 5))), r"k has shape \(1, 3, 2, 5\).*\(1, 3, 2, 4\)"),
        (dict(g=jnp.zeros((1, 3, 4, 5))), r"g has shape.*\(1, 3, 4, 4\)"),
        (dict(g=jnp.zeros(2)), r"g has shape \(2,\).*\(4,\)"),
        (dict(initial_state=jnp.zeros((1, 4, 4, 5))), r"initial_state has shape.*\(1, 4, 4, 4\)"),
        (dict(segment_ids=jnp.ones((1, 3))), "segment_ids has dtype float32; give integers"),
        (dict(q=jnp.zeros((1, 3, 2, 4), int)), "q has dtype int32"),
        (dict(chunk_size=0), "chunk_size is 0"),
        (dict(backend="cuda"), "backend 'cuda' does not exist"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    heads = dict(q=jnp.zeros((1, 3, 2, 4)), k=jnp.zeros((1, 3, 2, 4)))
    with pytest.raises(ValueError, match=f"linear_attention: {message}"):
        linear_attention(**{**heads, "v": jnp.zeros((1, 3, 4, 4)), "g": None, **change})
