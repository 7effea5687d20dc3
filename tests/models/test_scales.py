"""The multipliers of a model: embedding, residual branches, logits; attention's scale."""

import jax
import numpy as np
from flax import nnx

from effarch import config
from effarch.models import build
from effarch.models.context import Context


def test_multipliers_stand_where_they_should():
    m = config.default().model
    m.width, m.depth, m.layers = 16, 1, "attention/none"
    m.blocks.attention.update(num_heads=2, scale=0.3, rope=False)
    m.embed_scale, m.residual_scale, m.logit_scale, m.logit_softcap = 3.0, 0.5, 0.25, 2.0
    m.init_std = 0.5
    ids = np.array([[3, 1, 4, 1, 5]], np.int32)

    @jax.jit
    def run(key):
        model = build.model(m, vocab_size=7, rngs=nnx.Rngs(key))
        return model.logits(model(ids, Context())[0]), nnx.to_pure_dict(nnx.state(model))

    got, params = jax.device_get(run(jax.random.key(0)))
    table = params["embed"]["table"].astype(np.float64)
    mixer = {name: p["kernel"][0] for name, p in params["layers"]["0"]["mixer"].items()}

    def norm(x):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6)

    x = 3.0 * table[ids[0]]
    q, k, v = (np.reshape(norm(x) @ mixer[name], (5, 2, 8)) for name in "qkv")
    scores = np.einsum("thk,shk->hts", q, k) * 0.3
    scores = np.where(np.tril(np.ones((5, 5))), scores, -np.inf)
    p = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    o = np.einsum("hts,shk->thk", p, v).reshape(5, 16) @ mixer["out"]
    z = 0.25 * norm(x + 0.5 * o) @ table.T
    np.testing.assert_allclose(got[0], 2 * np.tanh(z / 2), atol=1e-4)
