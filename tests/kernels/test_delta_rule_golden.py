"""The delta rule against values that others computed, and its error messages."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effarch.kernels import gated_delta_rule, gated_delta_rule_step

pytestmark = pytest.mark.smoke

DATA = Path(__file__).parents[1] / "data"
GOLDEN = ["delta_rule_0", "delta_rule_1", "gated_delta_rule_0", "gated_delta_rule_1"]
GOLDEN += ["kda_0", "kda_1"]
BACKENDS = ["reference", "xla"]
CI = [pytest.mark.slow, pytest.mark.ci]


@pytest.mark.parametrize("backend", ["xla", pytest.param("reference", marks=CI)])
@pytest.mark.parametrize("name", GOLDEN)
def test_golden_outputs(name, backend, relative_rms):
    data = np.load(DATA / f"{name}.npz")
    o, final = jax.jit(functools.partial(gated_delta_rule, backend=backend))(
        *(data[x] for x in ("q", "k", "v", "beta")),
        data.get("g"),
        scale=float(data["scale"]),
        initial_state=data.get("initial_state"),
    )
    assert o.dtype == final.dtype == jnp.float32
    assert relative_rms(o, data["o"]) <= 1e-5
    assert relative_rms(final, data["final_state"]) <= 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
def test_golden_gradients(backend, relative_rms):
    data = np.load(DATA / "gated_delta_rule_grad.npz")
    names = ("q", "k", "v", "beta", "g")

    def loss(*inputs):
        return jnp.sum(gated_delta_rule(*inputs, backend=backend)[0] * data["w"])

    gradients = jax.jit(jax.grad(loss, argnums=range(5)))(*(data[x] for x in names))
    for name, gradient in zip(names, gradients):
        assert relative_rms(gradient, data[f"d{name}"]) <= 1e-4, name


@pytest.mark.parametrize(
    ("gate", "o_last", "o_sum", "state"),
    [
        ("none", (0.356002, -0.121482), 0.368160, (-0.349103, 0.175389, 0.594720, -0.012749)),
        ("head", (0.410539, 0.059111), 0.908877, (-0.456743, -0.097943, 0.502741, -0.036397)),
        ("channel", (0.411250, 0.057173), 0.851777, (-0.453342, -0.098698, 0.517777, -0.048610)),
    ],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_five_tokens_computed_by_hand(five_tokens, backend, gate, o_last, o_sum, state):
    inputs, gates = five_tokens
    rule = jax.jit(functools.partial(gated_delta_rule, backend=backend))
    o, final = jax.tree.map(np.asarray, rule(*inputs, gates[gate]))
    np.testing.assert_allclose(o[0, -1, 0], o_last, atol=2e-6)
    np.testing.assert_allclose(np.sum(o), o_sum, atol=5e-6)
    np.testing.assert_allclose(np.ravel(final), state, atol=2e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(v=jnp.zeros((1, 3, 3, 4))), "v has 3 heads.*multiple of the 2 heads"),
        (dict(k=jnp.zeros((1, 3, 2, 5))), r"k has shape \(1, 3, 2, 5\).*\(1, 3, 2, 4\)"),
        (dict(beta=jnp.zeros((1, 3, 2))), r"beta has shape.*\(1, 3, 4\)"),
        (dict(g=jnp.zeros((1, 3, 4, 5))), r"g has shape.*\(1, 3, 4, 4\)"),
        (dict(initial_state=jnp.zeros((1, 4, 4, 5))), r"initial_state has shape.*\(1, 4, 4, 4\)"),
        (dict(segment_ids=jnp.ones((1, 4), int)), r"segment_ids has shape.*\(1, 3\)"),
        (dict(segment_ids=jnp.ones((1, 3))), "segment_ids has dtype float32; give integers"),
        (dict(q=jnp.zeros((1, 3, 2, 4), int)), "q has dtype int32"),
        (dict(chunk_size=0), "chunk_size is 0"),
        (dict(backend="cuda"), "backend 'cuda' does not exist"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    heads = dict(q=jnp.zeros((1, 3, 2, 4)), k=jnp.zeros((1, 3, 2, 4)))
    inputs = dict(**heads, v=jnp.zeros((1, 3, 4, 4)), beta=jnp.zeros((1, 3, 4)), g=None)
    with pytest.raises(ValueError, match=message):
        gated_delta_rule(**{**inputs, **change})


def test_wrong_step_arguments_are_named():
    inputs = [jnp.zeros(s) for s in ((1, 4, 4, 4), (1, 2, 4), (1, 2, 4), (1, 4, 5), (1, 4))]
    with pytest.raises(ValueError, match=r"state has shape .*\(1, 4, 4, 5\)"):
        gated_delta_rule_step(*inputs)
