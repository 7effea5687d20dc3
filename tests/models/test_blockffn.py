"""BlockFFN against loops in NumPy: the layer, its losses, sparsity and the coefficient's schedule."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from flax import nnx

from effarch.models.context import Context
from effarch.models.ffns.blockffn import BlockFfn
from effarch.models.ffns.experts import sparsity

B, T, D, E, F = 2, 16, 6, 5, 4


def test_the_layer_is_a_sum_of_scaled_experts():
    rng = np.random.default_rng(0)
    graphdef, state = nnx.split(
        nnx.eval_shape(lambda: BlockFfn(D, num_experts=E, hidden=F, chunk_size=8, rngs=nnx.Rngs(0)))
    )
    arrays = jax.tree.map(
        lambda x: rng.standard_normal(x.shape).astype(np.float32), nnx.to_pure_dict(state)
    )
    arrays["schedule"] = np.asarray(sparsity.initial(0.05))
    x = rng.standard_normal((B, T, D)).astype(np.float32)
    segments = np.ones((B, T), np.int32)
    segments[0, 6:], segments[1, 12:] = 2, 0
    call = jax.jit(lambda arrays, x, ctx: nnx.merge(graphdef, arrays)(x, ctx))
    y, aux = call(arrays, x, Context(segment_ids=segments))
    z = x @ arrays["router"]["kernel"]
    a = np.maximum(z, 0)
    a /= np.sqrt(np.mean(a**2, axis=-1, keepdims=True) + 1e-6)
    want = np.zeros_like(x)
    for e in range(E):
        own = slice(e * F, (e + 1) * F)
        h = x @ arrays["up"]["kernel"][:, own]
        out = (h * scipy.special.expit(h)) @ arrays["down"]["kernel"][own]
        want += arrays["scale"][e] * a[..., e, None] * out
    np.testing.assert_allclose(y, want, rtol=1e-4, atol=1e-5)

    q = a / (a.sum(-1, keepdims=True) + 1e-5) * (segments != 0)[..., None]
    off = [np.prod(1 - q[b, t : t + 8] + 1e-5, axis=0) for b in range(B) for t in (0, 8)]
    np.testing.assert_allclose(aux["loss/chunk_sparsity"], 0.05 * (1 - np.mean(off)), rtol=1e-4)
    pairs = []
    for b in range(B):
        for t in range(1, T):
            if segments[b, t] == segments[b, t - 1] != 0:
                left, target = (
                    100.0 * z[b, t - 1].astype(np.float64),
                    scipy.special.expit(100.0 * z[b, t]),
                )
                pairs.append(np.logaddexp(0, left) - left * target)
    np.testing.assert_allclose(aux["loss/expert_locality"], 1e-3 * np.mean(pairs), rtol=1e-4)
    used = (segments != 0)[..., None] & (a > 0)
    tokens = (segments != 0).sum()
    np.testing.assert_allclose(
        aux["metric/token_sparsity"], 1 - (a > 0)[segments != 0].sum() / (tokens * E), rtol=1e-6
    )
    on = [used[b, t : t + 8].any(0) for b in range(B) for t in (0, 8)]
    np.testing.assert_allclose(aux["metric/chunk_sparsity_8"], 1 - np.mean(on), rtol=1e-6)
    assert aux["metric/chunk_sparsity_8"] <= aux["metric/token_sparsity"]


def test_the_coefficient_follows_a_scripted_loss():
    """A reference in plain Python: rests, then every 100 steps aims at itself times the loss's ratio."""
    rng = np.random.default_rng(0)
    losses = np.concatenate(
        [np.full(1100, 0.5), np.full(100, 0.9), np.full(200, 0.91), np.full(200, 0.3)]
        + [np.full(100, 0.3 * 2**n) for n in range(6)]
    ) * (1 + 0.01 * rng.standard_normal(2200))  # fmt: skip
    want, begin, end = [], 0.05, 0.05
    for step in range(len(losses)):
        phase = step % 100
        if phase == 0:
            begin = end
            if step >= 1000:
                ratio = losses[step - 100 : step].mean() / losses[step - 200 : step - 100].mean()
                end = min(begin * (max(ratio, 1.025) if ratio > 1 else ratio), 0.2)
        want.append(begin + (end - begin) * phase / 100)
    with jax.enable_x64(True):
        state = jnp.asarray([[0.05, 0.05, 0, 0, 0]], jnp.float64)

        @jax.jit
        def run(state, losses):
            def one(state, loss):
                value = sparsity.coefficient(state)[0]
                return sparsity.advance(state, loss[None], 0.05), value

            return jax.lax.scan(one, state, losses)[1]

        got = run(state, jnp.asarray(losses))
    np.testing.assert_allclose(got, want, rtol=1e-9)
    assert max(want) == pytest.approx(0.2) and min(want) < 0.05


def test_a_chunk_that_does_not_divide_the_row_is_an_error():
    with pytest.raises(ValueError, match=r"blockffn.chunk_size=7 does not divide the 16 tokens"):
        sparsity.chunk_loss(jnp.zeros((B, T, E)), jnp.ones((B, T), bool), 7)
