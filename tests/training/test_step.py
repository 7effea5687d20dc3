"""The train step: accumulation, skipped updates, model state and probes."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from effarch import config
from effarch.models import ffns
from effarch.models import state as state_lib
from effarch.models.context import Context
from effarch.models.layers import linear
from effarch.training import guard
from effarch.training import state as train_state
from effarch.training import step as step_lib

VOCAB = 32


class Watched(nnx.Module):
    """A linear ffn with a bias that counts, and a probe that hands out its backward pass's amax."""

    def __init__(self, width: int, *, rngs: nnx.Rngs):
        self.inner = linear.Linear(width, width, axes=("embed", "ffn"), rngs=rngs)
        self.seen = state_lib.ModelState(jnp.zeros((1,)), logical=("ffn",))
        self.amax = state_lib.Probe(jnp.zeros((1,)), logical=("ffn",))

    def __call__(self, x, ctx):
        y = _with_amax(self.inner(x), self.amax[...]) + 0 * self.seen[0]
        aux = {
            "count/tokens": jnp.float32(x.shape[0] * x.shape[1]),
            "metric/largest_max": jnp.max(jnp.abs(x)),
            "loss/small": 0.25 * jnp.ones(()),
        }
        return y, aux

    def next_state(self, state, aux, probes):
        return {"seen": state["seen"] + aux["count/tokens"][:, None] + 1e3 * probes["amax"]}


@jax.custom_vjp
def _with_amax(y, probe):
    return y


_with_amax.defvjp(
    lambda y, probe: (y, None), lambda _, d_y: (d_y, jnp.max(jnp.abs(d_y)).reshape(1))
)


def model_config(layers="attention/glu"):
    c = config.default().model
    c.width, c.depth, c.layers, c.init_std = 16, 1, layers, 0.2
    c.blocks.attention.num_heads = 2
    c.blocks.glu.hidden = 32
    return c


def batch_of(rows=4, length=8, seed=0):
    random = np.random.default_rng(seed)
    tokens = random.integers(0, VOCAB, (rows, length + 1)).astype(np.int32)
    weights = random.integers(0, 2, (rows, length)).astype(np.float32)
    return {
        "inputs": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "segment_ids": np.ones((rows, length), np.int32),
        "positions": np.tile(np.arange(length, dtype=np.int32), (rows, 1)),
        "loss_weights": weights,
    }


def start(model=None, spike_factor=0.0, accumulate=1, inner=None):
    model = model or model_config()
    plan = train_state.blueprint(model, vocab_size=VOCAB)
    tx = guard.guard(inner or optax.sgd(0.1, momentum=0.9), spike_factor=spike_factor)
    init = jax.jit(lambda key: train_state.initial(model, vocab_size=VOCAB, seed=key, tx=tx))
    state = init(jax.random.key(0))
    step = step_lib.train_step(plan, tx, optax.constant_schedule(0.1), accumulate=accumulate)
    return jax.jit(step), state


KEY = jax.random.key(1)


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.parametrize("accumulate", [2, 4])
def test_micro_batches_add_up_to_the_whole_batch(accumulate):
    """Rows have different numbers of scored tokens, so a mean of means would be wrong."""
    whole, state = start()
    parts, _ = start(accumulate=accumulate)
    want, want_metrics = whole(state, batch_of(), KEY)
    got, got_metrics = parts(state, batch_of(), KEY)
    for name in ("loss", "ce", "grad_norm"):
        np.testing.assert_allclose(got_metrics[name], want_metrics[name], rtol=1e-5)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_the_step_is_a_gradient_step_of_the_mean_loss():
    step, state = start(inner=optax.sgd(0.1))
    plan = train_state.blueprint(model_config(), vocab_size=VOCAB)
    batch = batch_of()

    def loss(params):
        total, _, _ = nnx.merge(plan.graphdef, params).loss(batch, Context())
        return total / batch["loss_weights"].sum()

    value, grads = jax.jit(jax.value_and_grad(loss))(state.params)
    new, metrics = step(state, batch, KEY)
    np.testing.assert_allclose(metrics["loss"], value, rtol=1e-6)
    np.testing.assert_allclose(metrics["grad_norm"], optax.tree.norm(grads), rtol=1e-5)
    for after, before, grad in zip(*map(jax.tree.leaves, (new.params, state.params, grads))):
        np.testing.assert_allclose(after, before - 0.1 * grad, rtol=1e-5, atol=1e-7)
    assert int(new.step) == 1


def test_an_update_that_is_not_finite_changes_nothing_and_is_counted():
    step, state = start()
    state, _ = step(state, batch_of(), KEY)
    bad = batch_of(seed=1)
    bad["loss_weights"] = bad["loss_weights"] * np.float32(np.nan)
    after, metrics = step(state, bad, KEY)
    jax.tree.map(np.testing.assert_array_equal, after.params, state.params)
    jax.tree.map(np.testing.assert_array_equal, after.opt_state.inner, state.opt_state.inner)
    assert int(after.step) == 2
    assert int(metrics["skipped"]) == int(metrics["skipped_in_a_row"]) == 1
    again, metrics = step(after, bad, KEY)
    assert int(metrics["skipped_in_a_row"]) == 2
    good, metrics = step(again, batch_of(seed=2), KEY)
    assert int(metrics["skipped"]) == 2
    assert int(metrics["skipped_in_a_row"]) == 0
    assert np.isfinite(metrics["loss"])
    assert any((a != b).any() for a, b in zip(*map(jax.tree.leaves, (good.params, state.params))))


def test_a_spike_of_the_gradient_is_skipped_once_the_usual_is_known():
    tx = guard.guard(optax.sgd(1.0), spike_factor=3.0)
    params = {"w": jnp.zeros(2)}
    state = tx.init(params)

    @jax.jit
    def update(state, size):
        grads = {"w": jnp.array([size, 0.0])}
        return tx.update(grads, state, params, loss=jnp.float32(1), grad_norm=size)

    _, early = update(state, jnp.float32(100.0))
    assert int(early.skipped) == 0  # nothing is usual yet
    for _ in range(guard.WARMUP):
        _, state = update(state, jnp.float32(1.0))
    np.testing.assert_allclose(state.average, 1.0, rtol=1e-5)
    updates, spiked = update(state, jnp.float32(3.5))
    assert int(spiked.skipped) == 1
    np.testing.assert_array_equal(updates["w"], 0.0)
    np.testing.assert_array_equal(spiked.average, state.average)
    updates, fine = update(spiked, jnp.float32(2.9))
    assert int(fine.skipped_in_a_row) == 0
    np.testing.assert_allclose(updates["w"], [-2.9, 0.0])


@pytest.mark.slow
def test_model_state_advances_by_aux_and_probes_and_the_optimizer_never_sees_it(monkeypatch):
    monkeypatch.setitem(ffns.KINDS, "watched", Watched)
    model = model_config("attention/watched + attention/glu")
    model.depth = 5
    model.blocks.watched = config.block("watched")
    results = {}
    for accumulate in (1, 2):
        step, state = start(model, accumulate=accumulate)
        paths = [jax.tree_util.keystr(p) for p, _ in jax.tree_util.tree_leaves_with_path(state)]
        assert not any(
            "seen" in path or "amax" in path for path in paths if "model_state" not in path
        )
        new, metrics = step(state, batch_of(), KEY)
        seen = jax.tree.leaves(new.model_state)
        results[accumulate] = np.sort(np.concatenate([np.ravel(x) for x in seen]))
        assert float(metrics["count/tokens"]) == 3 * 32
        np.testing.assert_allclose(metrics["loss/small"], 0.75)
        np.testing.assert_allclose(metrics["loss"], metrics["ce"] + 0.75, rtol=1e-6)
        assert float(metrics["metric/largest_max"]) > 1
    assert results[1].shape == (3,)
    assert (results[1] > 32).all()  # 32 tokens and a thousand times the largest gradient
    assert len(set(results[1])) == 3  # a layer's statistic is its own
    np.testing.assert_allclose(results[1], results[2], rtol=1e-4)
