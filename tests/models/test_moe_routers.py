"""Routers, their losses and what they remember, against formulas in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from effarch.models.context import Context
from effarch.models.ffns.experts import router_losses, router_state, routers

B, T, D, E, K = 3, 16, 8, 8, 3


def router(**options):
    """A router with random weights and bias, and its scores' input."""
    graphdef, state = nnx.split(
        nnx.eval_shape(lambda: routers.Router(D, E, rngs=nnx.Rngs(0), **{"top_k": K} | options))
    )
    rng = np.random.default_rng(0)
    arrays = {
        name: rng.standard_normal(x.shape).astype(np.float32)
        if name in ("kernel", "bias")
        else np.zeros(x.shape, x.dtype)
        for name, x in nnx.to_pure_dict(state).items()
    }
    return graphdef, arrays


def route(module, x, segment_ids=None):
    graphdef, arrays = module
    call = jax.jit(lambda arrays, x, ctx: nnx.merge(graphdef, arrays)(x, ctx))
    return jax.tree.map(np.asarray, call(arrays, x, Context(segment_ids=segment_ids)))


def inputs():
    return np.random.default_rng(1).standard_normal((B, T, D)).astype(np.float32)


def softmax(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


SCORES = {
    "softmax_topk_renorm": (softmax, True),
    "topk_softmax": (softmax, True),
    "softmax_topk": (softmax, False),
    "sigmoid_bias": (lambda z: 1 / (1 + np.exp(-z)), True),
    "sqrtsoftplus": (lambda z: np.sqrt(np.log1p(np.exp(z))), True),
}


@pytest.mark.parametrize("kind", routers.KINDS)
def test_choices_and_weights(kind):
    module, x = router(kind=kind, scaling=1.5), inputs()
    got = route(module, x)
    z = x.astype(np.float64) @ module[1]["kernel"]
    score, normalized = SCORES[kind]
    s = score(z)
    order = np.argsort(-(s + module[1].get("bias", 0.0)), axis=-1)[..., :K]
    np.testing.assert_array_equal(got.ids_BTK, order)
    weights = np.take_along_axis(s, order, axis=-1)
    if normalized:
        weights /= weights.sum(-1, keepdims=True)
    np.testing.assert_allclose(got.weights_BTK, 1.5 * weights, rtol=2e-6)
    if kind == "topk_softmax":
        of_chosen = softmax(np.take_along_axis(z, order, axis=-1))
        np.testing.assert_allclose(got.weights_BTK, 1.5 * of_chosen, rtol=2e-6)


def test_the_bias_decides_who_and_never_how_much():
    module, x = router(kind="sigmoid_bias"), inputs()
    first = route(module, x)
    module[1]["bias"] += 0.25
    same = route(module, x)
    for a, b in zip(first, same):
        np.testing.assert_array_equal(a, b)
    module[1]["bias"][:3] += 100.0
    forced = route(module, x)
    assert np.all(np.sort(forced.ids_BTK) == np.arange(3))
    s = 1 / (1 + np.exp(-(x @ module[1]["kernel"])))
    picked = np.take_along_axis(s, forced.ids_BTK, axis=-1)
    np.testing.assert_allclose(
        forced.weights_BTK, picked / picked.sum(-1, keepdims=True), rtol=1e-5
    )


def test_groups_limit_the_choice():
    """Of 4 groups of 2 the best 2 by the sum of their scores; each token stays within them."""
    module, x = router(kind="sigmoid_bias", num_groups=4, top_groups=2), inputs()
    got = route(module, x)
    biased = 1 / (1 + np.exp(-(x @ module[1]["kernel"]))) + module[1]["bias"]
    best = np.argsort(-biased.reshape(B, T, 4, 2).sum(-1), axis=-1)[..., :2]
    allowed = (best[..., None] == np.arange(E) // 2).any(-2)
    order = np.argsort(-np.where(allowed, biased, -np.inf), axis=-1)[..., :K]
    np.testing.assert_array_equal(got.ids_BTK, order)


def test_one_choice_keeps_its_score():
    got = route(router(kind="sigmoid_bias", top_k=1), inputs())
    assert got.weights_BTK.max() < 1 and got.weights_BTK.std() > 0.01


def test_the_schedule_thins_out_choices():
    """4 experts before step 5, 2 before step 7, then 1; weights as if that many had been asked for."""
    module = router(kind="sigmoid_bias", top_k=2, schedule=((5, 4), (7, 3)))
    x = inputs()
    for step, top_k in ((0, 4), (4, 4), (5, 3), (6, 3), (7, 2), (99, 2)):
        module[1]["steps"] = np.int32(step)
        got = route(module, x)
        plain = router(kind="sigmoid_bias", top_k=top_k)
        want = route(plain, x)
        np.testing.assert_array_equal(got.ids_BTK[..., :top_k], want.ids_BTK)
        assert np.all(got.ids_BTK[..., top_k:] == E)
        np.testing.assert_allclose(got.weights_BTK[..., :top_k], want.weights_BTK, rtol=1e-6)
        assert np.all(got.weights_BTK[..., top_k:] == 0)


def routing(probs=None, logits=None, top_k=2, valid=None):
    """A Routing whose best `top_k` experts by probability are chosen."""
    logits = np.log(probs) if logits is None else logits
    probs = softmax(logits) if probs is None else probs
    ids = np.argsort(-probs, axis=-1)[..., :top_k]
    valid = np.ones(ids.shape[:2], bool) if valid is None else valid
    ids = np.where(valid[..., None], ids, probs.shape[-1])
    arrays = (ids, np.ones(ids.shape, np.float32), logits, probs, valid)
    return routers.Routing(*map(jnp.asarray, arrays))


def random_routing(seed=0, **options):
    z = np.random.default_rng(seed).standard_normal((B, T, E)).astype(np.float32)
    return routing(logits=z, **options)


def balance_by_loops(r, rows, top_k, scaling="megatron"):
    """E sum_e f_e P_e over the given rows of the batch."""
    counts, mass, tokens = np.zeros(E), np.zeros(E), 0
    for b in rows:
        for t in range(r.ids_BTK.shape[1]):
            if r.valid_BT[b, t]:
                tokens += 1
                mass += np.asarray(r.probs_BTE[b, t], np.float64)
                for e in np.asarray(r.ids_BTK[b, t]):
                    counts[e] += 1
    f = counts / (tokens if scaling == "hf" else tokens * top_k)
    return E * np.sum(f * mass / tokens)


def test_balance_scopes_and_scalings():
    valid = np.ones((B, T), bool)
    valid[1, 5:] = False
    r = random_routing(valid=valid)
    every = range(B)
    for scaling in router_losses.SCALINGS:
        want = balance_by_loops(r, every, 2, scaling)
        np.testing.assert_allclose(router_losses.load_balance(r, scaling=scaling), want, rtol=1e-6)
    rows = np.mean([balance_by_loops(r, [b], 2) for b in every])
    np.testing.assert_allclose(router_losses.load_balance(r, scope="sequence"), rows, rtol=1e-6)
    local = router_losses.load_balance(r, scope="local", num_shards=B)
    np.testing.assert_allclose(local, rows, rtol=1e-6)
    p, f = np.zeros(4), np.zeros(4)
    for b, t in np.argwhere(valid):
        p += np.asarray(r.probs_BTE[b, t]).reshape(4, 2).sum(1) / valid.sum()
        for e in np.asarray(r.ids_BTK[b, t]):
            f[e // 2] += 1 / (2 * valid.sum())
    got = router_losses.load_balance(r, scope="expert_group", num_groups=4)
    np.testing.assert_allclose(got, 4 * np.sum(f * p), rtol=1e-6)


def test_hugging_face_pools_layers():
    """E sum(mean of one-hot over tokens of all layers * mean probability), summed over the K choices."""
    layers = [random_routing(seed) for seed in (0, 1)]
    pooled = routers.Routing(*(jnp.concatenate(parts) for parts in zip(*layers)))
    hot = np.eye(E)[np.asarray(pooled.ids_BTK).reshape(-1, 2)]
    probs = np.asarray(pooled.probs_BTE).reshape(-1, E)
    want = E * np.sum(hot.mean(0) * probs.mean(0)[None])
    np.testing.assert_allclose(router_losses.load_balance(pooled, scaling="hf"), want, rtol=1e-6)


def test_balance_is_one_at_balance_and_flat_on_the_plateau():
    """Scaling logits down leaves the choice skewed and sends the loss to 1; Top-1 still sees it."""
    even = np.full((1, E, E), 1e-6) + np.eye(E)[None]
    r = routing(probs=(even / even.sum(-1, keepdims=True)).astype(np.float32), top_k=1)
    np.testing.assert_allclose(router_losses.load_balance(r), 1, rtol=1e-5)
    np.testing.assert_allclose(router_losses.top1_balance(r), 1, rtol=1e-3)
    z = np.random.default_rng(0).standard_normal((1, 256, E)).astype(np.float32)
    z[..., 0] += 2.0
    skewed, small = routing(logits=z, top_k=1), routing(logits=1e-3 * z, top_k=1)
    assert router_losses.load_balance(skewed) > 1.2
    np.testing.assert_allclose(router_losses.load_balance(small), 1, atol=0.01)
    assert router_losses.top1_balance(small, temperature=0.1) > 1.2


def test_top1_and_z_losses():
    r = random_routing()
    p = softmax(np.asarray(r.logits_BTE, np.float64) / 0.5).reshape(-1, E)
    want = E * np.sum(p.mean(0) ** 2) / p.max(-1).mean()
    assert want > 1
    np.testing.assert_allclose(router_losses.top1_balance(r, temperature=0.5), want, rtol=1e-5)
    lse = np.log(np.exp(np.asarray(r.logits_BTE, np.float64)).sum(-1))
    np.testing.assert_allclose(router_losses.z_loss(r), np.mean(lse**2), rtol=1e-5)


def test_balance_gradient_goes_through_probabilities_alone():
    z = np.random.default_rng(0).standard_normal((B, T, E)).astype(np.float32)

    def loss(z):
        r = random_routing()
        return router_losses.load_balance(r._replace(probs_BTE=jax.nn.softmax(z)))

    r = random_routing()
    f = np.eye(E)[np.asarray(r.ids_BTK)].sum((0, 1, 2)) / (B * T * 2)
    want = jax.grad(lambda z: E * jnp.sum(f * jnp.mean(jax.nn.softmax(z), axis=(0, 1))))(z)
    np.testing.assert_allclose(jax.jit(jax.grad(loss))(z), want, atol=1e-6)


def test_load_metrics():
    even = router_losses.load_metrics(jnp.full(E, 3.0))
    np.testing.assert_allclose(even["metric/load_entropy"], 1, rtol=1e-6)
    np.testing.assert_allclose(even["metric/max_vio"], 0, atol=1e-6)
    found = router_losses.load_metrics(jnp.array([4.0, 2.0, 1.0, 1.0]))
    np.testing.assert_allclose(found["metric/max_vio"], 1, rtol=1e-6)
    np.testing.assert_allclose(found["metric/min_load"], 0.5, rtol=1e-6)
    share = np.array([0.5, 0.25, 0.125, 0.125])
    want = -np.sum(share * np.log(share)) / np.log(4)
    np.testing.assert_allclose(found["metric/load_entropy"], want, rtol=1e-6)


def test_the_bias_moves_by_signs():
    counts = np.array([[5.0, 1.0, 2.0, 0.0], [2.0, 2.0, 2.0, 2.0]], np.float32)
    state = {
        "bias": np.zeros((2, 4), np.float32),
        "load": np.full((2, 4), 0.25, np.float32),
        "idle_steps": np.array([[0, 3, 0, 7], [1, 1, 1, 1]], np.int32),
        "steps": np.array([0, 0], np.int32),
    }
    new = router_state.advance(state, counts, router_state.Updates(rate=0.5))
    np.testing.assert_array_equal(new["bias"], [[-0.5, 0.5, 0, 0.5], [0, 0, 0, 0]])
    np.testing.assert_array_equal(new["idle_steps"], [[0, 0, 0, 8], [0, 0, 0, 0]])
    np.testing.assert_allclose(new["load"][0], counts[0] / 8)
    np.testing.assert_array_equal(new["steps"], [1, 1])
    centred = router_state.advance(state, counts, router_state.Updates(0.5, zero_mean=True))
    np.testing.assert_allclose(centred["bias"].sum(-1), 0, atol=1e-7)
    state["steps"] = np.array([3, 3], np.int32)
    rests = router_state.advance(state, counts, router_state.Updates(0.5, stop_step=3))
    np.testing.assert_array_equal(rests["bias"], state["bias"])
