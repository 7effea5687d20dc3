"""A row cut in time over devices, which `vmap` plays: documents, padding and states at every cut."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effarch.kernels import gated_delta_rule, linear_attention
from effarch.models.layers import time_pieces

pytestmark = pytest.mark.slow

B, T, H, HV, K, V, PIECES = 2, 48, 1, 2, 5, 4, 6
# Of pieces of 8 tokens: a document that ends with its piece, one that fills its piece and goes on after
# a piece of padding, an id that comes back, padding at a cut; a row that begins with a piece of padding,
# a document over three pieces.
SEGMENTS = np.array(
    [
        [0] * 2 + [1] * 6 + [2] * 8 + [0] * 8 + [2] * 3 + [3] * 5 + [2] * 4 + [0] * 6 + [2] * 6,
        [0] * 8 + [5] * 8 + [6] * 20 + [7] * 8 + [0] * 4,
    ]
)


def make_inputs(rule, gate):
    """q, k (of norm 1), v, g, and beta of the delta rule; and the state before the rows."""
    rng = np.random.default_rng(0)
    q, k = rng.standard_normal((2, B, T, H, K))
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    g = {
        "none": None,
        "head": -np.exp(rng.standard_normal((B, T, HV)) - 1.5),
        "channel": -np.exp(rng.standard_normal((B, T, HV, K)) - 1.5),
    }[gate]
    beta = [2 * rng.random((B, T, HV))] if rule == "delta" else []
    return (q, k, rng.standard_normal((B, T, HV, V)), g, *beta), rng.standard_normal((B, HV, K, V))


def kernel(q, k, v, g, *beta, **options):
    options |= dict(chunk_size=16)
    if beta:
        return gated_delta_rule(q, k, v, *beta, g, **options)
    return linear_attention(q, k, v, g, **options)


def in_pieces(arrays, state):
    """o and the final state of rows whose pieces lie on an axis of `vmap`."""

    def cut(x):
        return jnp.moveaxis(x.reshape(B, PIECES, T // PIECES, *x.shape[2:]), 1, 0)

    def piece(arrays, segment_ids):
        return time_pieces.run(kernel, arrays, state, segment_ids, ("pieces",))

    o, final = jax.vmap(piece, axis_name="pieces")(jax.tree.map(cut, arrays), cut(SEGMENTS))
    return jnp.moveaxis(o, 0, 1).reshape(B, T, HV, V), final[0]


def with_gradients(run, arrays, state):
    outputs, pull = jax.vjp(run, arrays, state)
    waves = (jnp.cos(1.7 * jnp.arange(x.size) ** 1.1).reshape(x.shape) for x in outputs)
    return outputs, pull(tuple(waves))


@pytest.mark.parametrize(
    ("rule", "gate"), [("delta", "channel"), ("linear", "none"), ("linear", "head")]
)
def test_pieces_equal_the_whole_row(rule, gate):
    def whole(arrays, state):
        return kernel(*arrays, initial_state=state, segment_ids=SEGMENTS, backend="reference")

    with jax.enable_x64(True):
        inputs = make_inputs(rule, gate)
        found, expected = (
            jax.jit(functools.partial(with_gradients, run))(*inputs) for run in (in_pieces, whole)
        )
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-11)
