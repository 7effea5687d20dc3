"""A router's state through the real train step: counted once, whatever the accumulation."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from effarch import config
from effarch.training import guard
from effarch.training import state as train_state
from effarch.training import step as step_lib

VOCAB, E, K = 32, 4, 2


def batch_of(rows=4, length=8):
    tokens = np.random.default_rng(0).integers(0, VOCAB, (rows, length + 1)).astype(np.int32)
    segments = np.ones((rows, length), np.int32)
    segments[:, 6:] = 0
    return {
        "inputs": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "segment_ids": segments,
        "positions": np.tile(np.arange(length, dtype=np.int32), (rows, 1)),
        "loss_weights": (segments > 0).astype(np.float32),
    }


def one_step(accumulate, remat="none"):
    c = config.default().model
    c.width, c.depth, c.layers, c.init_std, c.remat = 16, 1, "attention/moe", 0.2, remat
    c.blocks.attention.num_heads = 2
    c.blocks.moe.update(num_experts=E, top_k=K, hidden=8, router="sigmoid_bias", bias_rate=0.5)
    plan = train_state.blueprint(c, vocab_size=VOCAB)
    tx = guard.guard(optax.adamw(1e-2, weight_decay=1.0), spike_factor=0.0)
    step = step_lib.train_step(plan, tx, lambda count: 1e-2, accumulate=accumulate)

    def run(key, batch):
        state = train_state.initial(c, vocab_size=VOCAB, seed=key, tx=tx)
        return step(state, batch, key)

    return jax.jit(run)(jax.random.key(0), batch_of())


@pytest.mark.slow
def test_counts_bias_and_metrics_of_a_step():
    """4 rows of 6 tokens, 2 choices each: 48, in one micro-batch, in two, and with remat."""
    state, metrics = one_step(1)
    assert metrics["count/expert_tokens"] == 48
    router = jax.tree.map(
        lambda x: np.asarray(x[0]), state.model_state["layers"]["0"]["ffn"]["router"]
    )
    counts = router["load"] * 48
    np.testing.assert_allclose(counts, np.round(counts), atol=1e-4)
    np.testing.assert_allclose(router["bias"], 0.5 * np.sign(12 - np.round(counts)))
    assert router["steps"] == 1
    np.testing.assert_allclose(metrics["metric/max_vio"], counts.max() / 12 - 1, rtol=1e-4)
    for other, _ in (one_step(2), one_step(1, remat="full")):
        for a, b in zip(jax.tree.leaves(other.model_state), jax.tree.leaves(state.model_state)):
            np.testing.assert_allclose(a, b, atol=1e-6)
    biases = [
        path
        for path, _ in jax.tree_util.tree_leaves_with_path(state.opt_state)
        if "bias" in str(path)
    ]
    assert not biases
    assert jnp.isfinite(metrics["loss"])
