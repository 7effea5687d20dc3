"""The parts that mixers share: feature maps, decays, gates, learned starts, the cache of attention."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from effarch.configs import hybrids
from effarch.models import build, parameters
from effarch.models.layers import decay, feature_maps, forget_gate, kv_cache


@functools.partial(jax.jit, static_argnames="kinds")
def features(x, kinds):
    """Features of x by kind, and the matrices of the learned maps."""
    new = functools.partial(feature_maps.FeatureMap, init_std=0.5, rngs=nnx.Rngs(0))
    maps = {kind: new(kind, *x.shape[2:]) for kind in kinds}
    found = {kind: feature_map(x) for kind, feature_map in maps.items()}
    assert all(found[kind].shape[-1] == maps[kind].features for kind in kinds)
    return found, {kind: maps[kind].kernel[...] for kind in kinds if maps[kind].num_maps}


def test_feature_maps_of_a_vector():
    x = np.random.default_rng(0).standard_normal((1, 3, 2, 4)).astype(np.float32)
    found, kernels = features(x, tuple(kind for kind in feature_maps.KINDS if kind != "taylor"))
    e = np.exp(np.concatenate([x, -x], -1))
    r = np.maximum(np.concatenate([x, -x], -1), 0)
    w = np.asarray(kernels["product"])
    first, second = (np.einsum("bthk,hkj->bthj", x, w[m]) for m in (0, 1))
    want = {
        "identity": x,
        "relu": np.maximum(x, 0),
        "elu": np.where(x > 0, x + 1, np.exp(x)),
        "t2r": np.maximum(x, 0),  # W starts as the identity
        "hedgehog": e / e.sum(-1, keepdims=True),
        "dpfp": r * np.concatenate([r[..., -1:], r[..., :-1]], -1),
        "product": first * second,
    }
    assert found.keys() == want.keys()
    for kind in want:
        np.testing.assert_allclose(found[kind], want[kind], rtol=1e-5, atol=1e-6, err_msg=kind)
    assert 0.3 < w.std() < 0.7 and np.any(w[0] != w[1])


def test_taylor_features_expand_the_exponential():
    q, k = np.random.default_rng(0).standard_normal((2, 1, 5, 2, 6)).astype(np.float32)
    z = np.einsum("bihk,bjhk->bhij", q, k) / np.sqrt(6)
    q, k = (features(x, ("taylor",))[0]["taylor"] for x in (q, k))
    product = np.einsum("bihf,bjhf->bhij", q, k)
    np.testing.assert_allclose(product, 1 + z + z**2 / 2, rtol=1e-4, atol=1e-5)


def test_decays_begin_where_mamba_begins():
    """Steps of 0.001 to 0.1 times rates of 1 to 16 at input 0."""
    rate = decay.DecayRate(500, min_rate=1.0, rngs=nnx.Rngs(0))
    zero = jnp.zeros((1, 1, 500))
    step, log_decay = np.asarray(rate.step(zero)), np.asarray(rate(zero))
    assert 1e-3 <= step.min() < 2e-3 and 0.05 < step.max() <= 0.1001
    rates = -log_decay / step
    assert 1 <= rates.min() < 2 and 15 < rates.max() <= 16.001
    # Log-uniform: as many steps below as above the geometric mean.
    assert 0.4 < np.mean(step < 0.01) < 0.6


def test_a_bounded_decay_stays_above_its_bound():
    rate = decay.DecayRate(2, channels=3, lower_bound=-5.0, rngs=nnx.Rngs(0))
    x = np.array([-1e4, 0.0, 1e4], np.float32)[None, :, None, None] * np.ones((2, 3), np.float32)
    g = np.asarray(rate(x))
    assert np.all(g[:, 0] == 0) and np.all(g[:, 2] == -5)
    assert np.all((g[:, 1] < -1e-3) & (g[:, 1] > -0.6))  # steps of 0.001 to 0.1 times 5, about


@pytest.mark.parametrize("bound", [0.0, -5.1])
def test_a_bound_that_is_none_is_refused(bound):
    with pytest.raises(ValueError, match=f"lower_bound={bound}"):
        decay.DecayRate(2, lower_bound=bound, rngs=nnx.Rngs(0))


def test_forget_gates_close_with_depth():
    """Bounds of l / L in every layer, stacked or alone; in layer 0 nearly none."""
    c = hybrids.get_config("mixer=hgrn2,ratio=3").model

    @jax.jit
    def bounds(key):
        state = nnx.state(build.model(c, vocab_size=8, rngs=nnx.Rngs(key)), nnx.Param)
        return {
            path: jax.nn.sigmoid(leaf)
            for key_path, leaf in jax.tree_util.tree_leaves_with_path(nnx.to_pure_dict(state))
            if (path := parameters.path_of(key_path)).endswith("bound")
        }

    found = {}
    for path, values in bounds(jax.random.key(0)).items():
        for public, row in zip(parameters.public_paths(path), values, strict=True):
            found[int(public.split("/")[1])] = row
    assert sorted(found) == [0, 1, 2, 4, 5, 6]
    for layer, row in found.items():
        np.testing.assert_allclose(row, np.full(128, max(layer / 8, 1e-3)), rtol=1e-5)


def test_a_bound_has_one_start():
    with pytest.raises(ValueError, match=r"lower_bound=0\.5 and bound_by_depth give two starts"):
        forget_gate.ForgetGate(4, lower_bound=0.5, by_depth=True)


@pytest.mark.parametrize("bound", [0.0, 1.0])
def test_a_forget_gate_needs_a_bound_between_0_and_1(bound):
    with pytest.raises(ValueError, match=f"lower_bound={bound} must lie between 0 and 1"):
        forget_gate.ForgetGate(4, lower_bound=bound)


def test_forget_gates_are_exact_at_extremes():
    x = jnp.array([[[-100.0, 0.0, 100.0]]])
    free = np.asarray(forget_gate.ForgetGate(3)(x))[0, 0]
    np.testing.assert_allclose(free, [-100.0, np.log(0.5), -np.exp(-100.0)], rtol=1e-6, atol=1e-40)
    bounded = np.asarray(forget_gate.ForgetGate(3, lower_bound=0.25)(x))[0, 0]
    np.testing.assert_allclose(bounded, np.log([0.25, 0.625, 1.0]), rtol=1e-5, atol=1e-7)


def test_a_ring_keeps_the_last_tokens():
    cache = kv_cache.init(1, 3, {"k": (2,)}, jnp.float32)
    x = jnp.arange(10.0).reshape(1, 5, 2)
    cache = kv_cache.append(cache, {"k": x, "positions": jnp.array([[0, 1, 2, 3, -1]])})
    np.testing.assert_array_equal(cache["positions"], [[3, 1, 2]])
    np.testing.assert_array_equal(cache["k"][0, :, 0], [6, 2, 4])
