"""Confidence-guided annealing: which weights are free, and that all others keep every bit."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from effarch import config as config_lib
from effarch import config_check
from effarch.models import build
from effarch.models.layers import quantizer
from effarch.training import setup
from effarch.training.optimizers import annealing

W = np.random.default_rng(0).standard_normal((2, 48, 8)).astype(np.float32)


def expected(w, bits, reach):
    """By the formula, threshold by threshold."""
    n = 2 ** (bits - 1)
    result = np.zeros(w.shape, bool)
    for layer, row in np.ndindex(w.shape[0], w.shape[2]):
        values = w[layer, :, row].astype(np.float64)
        c = np.clip(values / (2 * np.abs(values).mean()), -1, 1 - 1e-6)
        for i in range(-n, n - 1):
            result[layer, :, row] |= np.abs(c * n - 0.5 - i - 0.5) <= reach
    return result


def test_only_weights_near_a_threshold_move_and_only_in_the_phase():
    tx = annealing.confine(optax.adamw(1e-2, weight_decay=0.5), {"a": (2, -2)}, start=2, reach=0.05)
    params = {"a": jnp.asarray(W), "b": jnp.asarray(W)}
    grads = jax.tree.map(jnp.sign, params)

    @jax.jit
    def run(params):
        def one(carry, _):
            updates, state = tx.update(grads, carry[1], carry[0])
            return (optax.apply_updates(carry[0], updates), state), carry[0]

        (last, _), before = jax.lax.scan(one, (params, tx.init(params)), length=3)
        return before, last

    before, last = run(params)
    assert np.all(before["a"][1] != before["a"][0]) and np.all(before["a"][2] != before["a"][1])
    moved = np.asarray(last["a"] != before["a"][2])
    np.testing.assert_array_equal(moved, expected(np.asarray(before["a"][2]), 2, 0.05))
    assert 0.01 < moved.mean() < 0.3
    assert np.all(last["b"] != before["b"][2])


def small():
    config = config_lib.default()
    config.model.width, config.model.depth = 64, 2
    config.model.blocks.attention.num_heads = 2
    return config


def test_annealing_without_matrices_to_confine_is_refused():
    config = small()
    config.quantization.anneal_steps = 3
    mesh = jax.make_mesh((1,) * 5, ("data", "fsdp", "expert", "context", "tensor"))
    with pytest.raises(ValueError, match="anneal_steps=3 needs layers that StatsQ rounds"):
        setup.on_mesh(config_check.finish(config), mesh, vocab_size=64)


def test_the_matrices_of_a_model_that_it_confines():
    config = small()
    config.quantization.rules = ("layers/1/ffn/* ofq bits=3",)
    model = build.abstract(config.model, vocab_size=64, quantization=config.quantization)
    found = quantizer.statistical(model)
    assert found == {f"layers/1/ffn/{name}/kernel": (3, -2) for name in ("gate", "up", "down")}
