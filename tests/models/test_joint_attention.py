"""Queries and keys rounded as one matrix (QKR): equal to separate ones unless rounded; the levels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from effarch.models.context import Context
from effarch.models.mixers.attention import Attention

WIDTH, LENGTH = 32, 12
X = np.random.default_rng(0).standard_normal((2, LENGTH, WIDTH)).astype(np.float32)


def build(**options):
    options = dict(num_heads=4, num_kv_heads=2, rope=False, init_std=0.3) | options
    return Attention(WIDTH, **options, rngs=nnx.Rngs(0))


def outputs(x):
    """Separate, joint without and with rounding, and the joint one token by token."""
    separate, joint, rounded = build(), build(joint_bits=0), build(joint_bits=3)
    cache, steps = joint.init_cache(2, LENGTH), []
    for t in range(3):
        ctx = Context(positions=jnp.full((2, 1), t))
        y, cache, _ = joint(x[:, t : t + 1], ctx, cache)
        steps.append(y[:, 0])
    return *(layer(x, Context())[0] for layer in (separate, joint, rounded)), jnp.stack(steps, 1)


def test_joint_attention_is_attention_and_its_rounding_is_statsq():
    separate, joint, rounded, steps = jax.jit(outputs)(X)
    np.testing.assert_allclose(joint, separate, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(steps, joint[:, :3], rtol=1e-4, atol=1e-5)

    layer = build()
    kernels = {
        name: np.asarray(getattr(layer, name).kernel[...]) for name in ("q", "k", "v", "out")
    }
    w_q, w_k, w_v = (kernels[name].reshape(WIDTH, -1, 8) for name in "qkv")
    a = np.stack([w_q[:, h] @ w_k[:, h // 2].T for h in range(4)])
    scale = 2 * np.abs(a).mean((0, 2), keepdims=True)
    a = scale * (np.round(np.clip(a / scale, -1, 1 - 1e-6) * 4 - 0.5) + 0.5) / 4
    want = np.zeros((2, LENGTH, 4, 8))
    for b, h in np.ndindex(2, 4):
        scores = X[b] @ a[h] @ X[b].T / np.sqrt(8)
        scores = np.where(np.tri(LENGTH), scores, -np.inf)
        share = np.exp(scores - scores.max(1, keepdims=True))
        want[b, :, h] = share / share.sum(1, keepdims=True) @ (X[b] @ w_v[:, h // 2])
    want = want.reshape(2, LENGTH, WIDTH) @ kernels["out"]
    np.testing.assert_allclose(rounded, want, rtol=1e-3, atol=1e-3)
    assert np.linalg.norm(rounded - separate) > 0.02 * np.linalg.norm(separate)


def test_what_stands_between_queries_and_keys_is_refused():
    for options in (dict(rope=True), dict(qk_norm=True)):
        with pytest.raises(ValueError, match=r"joint_bits=4 rounds W_q W_k\^T, which rotary"):
            build(joint_bits=4, **options)
    with pytest.raises(ValueError, match="joint_bits=9 must be 0"):
        build(joint_bits=9)
