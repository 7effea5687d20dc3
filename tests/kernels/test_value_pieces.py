"""Wide value heads in pieces: the same outputs, states and gradients by the recurrence."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effarch.kernels import gated_delta_rule
from effarch.kernels.chunked import value_pieces

B, T, H, HV, K, V = 2, 9, 1, 2, 3, 7


def whole(q, k, v, beta, g, state):
    return gated_delta_rule(q, k, v, beta, g, initial_state=state, backend="reference")


def in_pieces(q, k, v, beta, g, state, pieces):
    v, (beta, g), state = value_pieces.split(v, (beta, g), state, pieces)
    assert v.shape == (B, T, HV * pieces, -(-V // pieces))
    o, final = whole(q, k, v, beta, g, state)
    return value_pieces.join(o, final, pieces, V)


@pytest.mark.parametrize("gate", ["none", "head", "channel"])
def test_pieces_of_a_value_head_are_the_head(gate):
    rng = np.random.default_rng(0)
    q, k = rng.standard_normal((2, B, T, H, K)) / K**0.5
    shape = {"none": None, "head": (B, T, HV), "channel": (B, T, HV, K)}[gate]
    g = None if shape is None else -np.exp(rng.standard_normal(shape))
    inputs = (q, k, rng.standard_normal((B, T, HV, V)), 2 * rng.random((B, T, HV)), g)
    inputs += (rng.standard_normal((B, HV, K, V)),)

    @jax.jit
    def run(*inputs):
        found = []
        for rule in (whole, *(functools.partial(in_pieces, pieces=n) for n in (2, 3))):
            outputs, pull = jax.vjp(rule, *inputs)
            found.append((outputs, pull(jax.tree.map(jnp.cos, outputs))))
        return found

    with jax.enable_x64(True):
        expected, *others = run(*inputs)
        for found in others:
            jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-12), found, expected)
