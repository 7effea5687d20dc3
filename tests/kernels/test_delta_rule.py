"""The delta rule: the chunked form, its gradient and the public contract.

Most comparisons run in float64, where the chunked form and the recurrence agree to 1e-12 and every
wrong factor shows. What linear attention must do as well is in test_chunked_recurrences.py.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effarch.kernels import gated_delta_rule_step

GATES = ["none", "head", "channel"]


@pytest.fixture
def op(delta_rule):
    return delta_rule


@pytest.mark.parametrize("gate", [pytest.param("none", marks=pytest.mark.slow), "head", "channel"])
def test_values_and_gradients_equal_the_recurrence(op, float64, gate):
    inputs = op.inputs(gate)
    expected = op.forward_backward(*inputs, segments=op.SEGMENTS, backend="reference")
    op.assert_close(op.forward_backward(*inputs, segments=op.SEGMENTS), expected, 1e-12)


@pytest.mark.parametrize("gate", GATES)
def test_rows_of_one_document_equal_the_recurrence(op, gate):
    """float32, without segment ids, judged in float64."""
    inputs = op.inputs(gate, np.float32)
    op.assert_close(op.forward_backward(*inputs), op.in_float64(inputs), 3e-6)


SLOW = [pytest.mark.slow, pytest.mark.ci]


@pytest.mark.parametrize(
    ("gate", "sizes"),  # 1 is in effect 16, 50 is 64; the other tests have chunks of 32
    [
        ("head", (1, 128)),
        ("channel", (50,)),
        pytest.param("none", (16, 64, 128), marks=SLOW),
        pytest.param("head", (64,), marks=SLOW),
        pytest.param("channel", (16, 128), marks=SLOW),
    ],
)
def test_every_chunk_size_gives_the_same(op, float64, gate, sizes):
    inputs = op.inputs(gate)
    expected, _ = op.in_float64(inputs)
    for chunk_size in sizes:
        op.assert_close(op.forward(*inputs, chunk_size=chunk_size), expected, 1e-12)


@pytest.mark.parametrize("gate", GATES)
def test_steps_equal_the_whole_row(op, gate):
    *inputs, state = op.inputs(gate, np.float32)
    step = op.compiled(gated_delta_rule_step)
    after, outputs = state, []
    for t in range(op.T):
        o, after = step(after, *(None if x is None else x[:, t] for x in inputs))
        outputs.append(o)
    whole, _ = op.forward_backward(*inputs, state)
    op.assert_close((np.stack(outputs, 1), after), whole, 2e-6)


@pytest.mark.parametrize("gate", ["head", pytest.param("channel", marks=pytest.mark.slow)])
def test_packed_documents_equal_documents_alone(op, float64, gate):
    """Each document of row 0 alone, without segment ids, through the recurrence."""
    *inputs, state = op.inputs(gate)
    results = op.forward_backward(*inputs, state, segments=op.SEGMENTS)
    (o, final), gradients = jax.tree.map(np.asarray, results)
    d_o, d_final = op.cotangents((o, final))
    row, is_real = op.SEGMENTS[0], op.SEGMENTS[0] != 0
    borders = [0, *(np.flatnonzero(row[1:] != row[:-1]) + 1), op.T]
    spans = [(a, b) for a, b in itertools.pairwise(borders) if row[a] != 0]
    assert [b - a for a, b in spans] == [5, 1, 1, 20, 20, 1, 5]

    @op.compiled
    def alone(inputs, state, d_o, d_final):
        outputs, pull = jax.vjp(lambda x, s: op.rule(*x, s, backend="reference"), inputs, state)
        return outputs, pull((d_o, d_final))

    for a, b in spans:
        is_first, is_last = (a, b) == spans[0], (a, b) == spans[-1]
        own = tuple(x[:1, a:b] for x in inputs)
        own_state = state[:1] * is_first
        (o_alone, final_alone), (d_inputs, d_state) = alone(
            own, own_state, d_o[:1, a:b], d_final[:1] * is_last
        )
        op.assert_close(o[:1, a:b], o_alone, 1e-12)
        for name, gradient in zip(("q", "k", "v", "beta", "g"), d_inputs):
            np.testing.assert_allclose(gradients[name][:1, a:b], gradient, atol=1e-12)
        if is_first:
            op.assert_close(gradients["state"][:1], d_state, 1e-12)
        if is_last:
            op.assert_close(final[:1], final_alone, 1e-12)
    assert np.all(o[0, ~is_real] == 0)
    assert all(np.all(gradients[name][0, ~is_real] == 0) for name in ("q", "k", "v", "beta", "g"))


@pytest.mark.parametrize("beta", [1.0, 2.0])
@pytest.mark.parametrize("gate", GATES)
def test_repeated_keys_are_accurate(op, gate, beta):
    """Power series lose every digit here; the recurrence in float64 is the judge."""
    q, k, v, old_beta, g, state = op.inputs(gate, np.float32)
    k = np.broadcast_to(k[:, :1], k.shape)
    g = None if g is None else np.zeros_like(g)
    inputs = (q, k, v, np.full_like(old_beta, beta), g, state)
    op.assert_close(op.forward_backward(*inputs), op.in_float64(inputs), 1e-5)


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.parametrize("gate", ["none", "channel"])
def test_repeated_keys_through_four_whole_chunks(op, gate):
    """Chunks of 64, whose inverse takes two merges."""
    q, k, v, old_beta, g, state = op.inputs(gate, np.float32, length=256)
    k = np.broadcast_to(k[:, :1], k.shape)
    g = None if g is None else np.zeros_like(g)
    run = op.compiled(lambda *inputs: op.with_gradients(*inputs, backend="xla", chunk_size=64))
    judge = op.compiled(lambda *inputs: op.with_gradients(*inputs, backend="reference"))
    # With beta = 2 every token turns the state over: 256 roundings of 1.2e-7 add up, none fades, and how
    # they add up depends on the order in which a CPU sums (below 5e-5 with AVX-512, 8e-5 with AVX2).
    for beta, bound in ((1.0, 1e-5), (2.0, 1e-4)):
        inputs = (q, k, v, np.full_like(old_beta, beta), g, state)
        with jax.enable_x64(True):
            wide = [None if x is None else np.float64(x) for x in inputs]
            expected = jax.tree.map(np.asarray, judge(*wide))
        outputs, gradients = run(*inputs)
        op.assert_close(outputs, expected[0], bound)
        op.assert_close(gradients, expected[1], 1e-4)


@pytest.mark.parametrize("gate", GATES)
def test_tokens_that_write_nothing(op, gate):
    """beta = 0 or k = 0, no decay: the state stays as it is, bit for bit."""
    q, k, v, beta, g, state = op.inputs(gate, np.float32)
    g = None if g is None else np.zeros_like(g)
    (_, final), _ = op.forward_backward(q, k, v, np.zeros_like(beta), g, state)
    np.testing.assert_array_equal(final, state)
    (_, final), _ = op.forward_backward(q, np.zeros_like(k), v, beta, g, state)
    np.testing.assert_array_equal(final, state)


def test_bfloat16_inputs(op, relative_rms):
    inputs = op.inputs("head", np.float32)
    rounded = [x.astype(jnp.bfloat16) for x in inputs[:4]]
    o, final = op.forward(*rounded, *inputs[4:])
    assert o.dtype == jnp.bfloat16 and final.dtype == jnp.float32
    wide = (x.astype(np.float32) for x in rounded)
    (o_wide, final_wide), _ = op.forward_backward(*wide, *inputs[4:])
    assert relative_rms(final, final_wide) <= 1e-6  # computed in float32
    assert relative_rms(o, o_wide) <= 3e-3  # o itself is rounded to 8 bits


def test_zero_gates_equal_no_gates(op, float64):
    q, k, v, beta, g, state = op.inputs("head")
    zero = op.forward_backward(q, k, v, beta, np.zeros_like(g), state, segments=op.SEGMENTS)
    zero[1]["g"] = None
    op.assert_close(
        op.forward_backward(q, k, v, beta, None, state, segments=op.SEGMENTS), zero, 1e-12
    )
