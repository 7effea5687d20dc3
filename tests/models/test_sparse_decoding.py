"""A sparse model that generates reads few neurons and its layers apart, and draws what it would draw."""

import jax
import numpy as np
import pytest
from flax import nnx

from effarch import config, config_check
from effarch.kernels.sparse_ffn import api as sparse_ffn
from effarch.models import build, decoding
from effarch.models.context import Context


@pytest.mark.slow
@pytest.mark.ci
def test_generation_equals_the_whole_text_at_once(monkeypatch):
    """Two prompts, best tokens; three layers, two of them stacked."""
    c = config.default()
    c.model.width, c.model.depth, c.model.scan = 32, 3, "never"
    c.model.layers = "first: attention/sparse_glu; repeat: spark_attention/spark_ffn"
    c.model.init_std = 0.3
    c.model.blocks.attention.num_heads = c.model.blocks.spark_attention.num_heads = 2
    c.model.blocks.spark_attention.num_keys = 6
    c.model.blocks.spark_ffn.update(hidden=192, predictor_width=12)
    c.model.blocks.sparse_glu.hidden = 192
    model = build.model(config_check.finish(c).model, vocab_size=50, rngs=nnx.Rngs(0))
    read = []
    kernel = sparse_ffn.sparse_ffn
    monkeypatch.setattr(sparse_ffn, "sparse_ffn", lambda *a: read.append(a[2].shape) or kernel(*a))
    prompts = [[1, 2, 3, 4, 5, 6, 7, 8, 9], [4, 4, 7]]
    drawn = np.stack(list(decoding.generate(model, prompts, max_tokens=5, temperature=0)), axis=1)
    assert read == [(192, 32), (192, 20), (192, 20)]  # once for each layer, while it is traced

    graphdef, state = nnx.split(model)

    @jax.jit
    def best(state, tokens, segment_ids):
        model = nnx.merge(graphdef, state)
        ctx = Context(segment_ids=segment_ids, train=False)
        return model.logits(model(tokens, ctx)[0]).argmax(-1)

    tokens = np.zeros((2, 16), np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt
        tokens[row, len(prompt) : len(prompt) + 5] = drawn[row]
    lengths = np.array([len(prompt) + 5 for prompt in prompts])[:, None]
    found = np.asarray(best(nnx.to_pure_dict(state), tokens, (np.arange(16) < lengths).astype(int)))
    for row, prompt in enumerate(prompts):
        np.testing.assert_array_equal(found[row, len(prompt) - 1 :][:5], drawn[row])
