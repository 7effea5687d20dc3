"""The published hybrids: what stands where, how large they are, that they train and decode."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from effarch.configs import hybrids
from effarch.models import accounting, build, layer_language
from effarch.models.context import Context

VOCAB, ROWS, PROMPT, LENGTH = 32, 2, 24, 40


def kinds(c):
    """The kind of mixer of every layer."""
    planned = layer_language.layers(c.model.layers, c.model.depth)
    return [c.model.blocks[layer.mixer].kind for layer in planned]


@pytest.mark.parametrize("size", ["340m", "1.3b"])
@pytest.mark.parametrize(
    ("arg", "softmax", "recurrent"),
    [
        ("mixer=hgrn,ratio=24", [23], {"hgrn"}),
        ("mixer=gla,ratio=12", [11, 23], {"gla"}),
        ("mixer=hgrn2,ratio=6", [7, 15, 23], {"hgrn2"}),
        ("mixer=retnet,ratio=3", range(3, 24, 4), {"retnet"}),
        ("mixer=delta_net,ratio=0", [], {"delta_net"}),
        ("model=deltanet_swa", range(1, 24, 2), {"delta_net"}),
        ("model=deltanet_global", [1, 12], {"delta_net"}),
        ("model=gdn_h1", range(1, 24, 2), {"gated_delta_net"}),
        ("model=gdn_h2", range(2, 24, 3), {"mamba2", "gated_delta_net"}),
        ("model=qwen3_next", range(3, 24, 4), {"gated_delta_net"}),
        ("model=kimi_linear", range(3, 24, 4), {"kda"}),
        ("model=olmo_hybrid", range(3, 24, 4), {"gated_delta_net"}),
    ],
)
def test_softmax_stands_where_published(arg, softmax, recurrent, size):
    found = kinds(hybrids.get_config(f"{arg},size={size}"))
    is_softmax = [kind in ("attention", "latent_attention") for kind in found]
    assert np.flatnonzero(is_softmax).tolist() == list(softmax)
    assert {kind for kind, other in zip(found, is_softmax) if not other} == recurrent


@pytest.mark.parametrize("ratio", [1, 2, 3, 6, 12, 24])
def test_a_study_of_any_depth_has_attention(ratio):
    tiny = kinds(hybrids.get_config(f"mixer=gla,ratio={ratio}"))
    assert len(tiny) == 8
    assert tiny.count("attention") == {1: 4, 2: 3, 3: 2}.get(ratio, 1)
    assert tiny[-1] == "attention" and tiny[0] != "attention"


@pytest.mark.parametrize(
    ("arg", "millions"),
    [
        ("mixer=delta_net,size=340m", 374),
        ("mixer=gla,size=340m", 374),
        ("mixer=hgrn,size=340m", 374),
        ("mixer=hgrn2,size=1.3b", 1364),
        ("mixer=gated_delta_net,size=340m", 380),
        ("mixer=gated_delta_net,size=1.3b", 1387),
        ("mixer=retnet,size=340m", 380),
        ("mixer=retnet,size=1.3b", 1352),
    ],
)
def test_pure_models_of_the_study_have_the_published_size(arg, millions):
    c = hybrids.get_config(f"{arg},ratio=0")
    total = accounting.count(build.abstract(c.model, vocab_size=32000), 4096).params_total
    assert round(total / 1e6) == millions


@pytest.mark.slow
@pytest.mark.parametrize("name", hybrids.MODELS)
def test_a_hybrid_trains_and_then_decodes_as_it_reads(name):
    """Prompts of 24 and 13 tokens, then one by one, through windows that have long been full."""
    c = hybrids.get_config(f"model={name}").model
    c.depth, c.init_std = 5 if name == "deltanet_global" else 4, 0.1
    c.blocks.local.window, c.blocks.glu.hidden = 8, 64
    graphdef, _ = nnx.split(build.abstract(c, vocab_size=VOCAB))
    tokens = np.random.default_rng(0).integers(0, VOCAB, (ROWS, LENGTH)).astype(np.int32)
    place = np.tile(np.arange(LENGTH, dtype=np.int32), (ROWS, 1))
    batch = dict(inputs=tokens, targets=np.roll(tokens, -1, 1), positions=place)
    batch |= dict(segment_ids=np.ones_like(tokens), loss_weights=np.ones((ROWS, LENGTH)))

    @jax.jit
    def start(key):
        return nnx.to_pure_dict(nnx.state(build.model(c, vocab_size=VOCAB, rngs=nnx.Rngs(key))))

    @jax.jit
    def train(params):
        def step(params, _):
            def loss(params):
                return nnx.merge(graphdef, params).loss(batch, Context())[0] / tokens.size

            value, gradients = jax.value_and_grad(loss)(params)
            return jax.tree.map(lambda x, g: x - 0.3 * g, params, gradients), value

        return jax.lax.scan(step, params, length=8)

    @jax.jit
    def read(params, tokens, ctx, cache=None):
        model = nnx.merge(graphdef, params)
        x, cache, _ = model(tokens, ctx, cache)
        return model.logits(x), cache

    params, losses = train(start(jax.random.key(0)))
    assert np.all(np.isfinite(losses)) and losses[-1] < 0.9 * losses[0]
    whole = np.asarray(read(params, tokens, Context(train=False))[0])
    assert whole.std() > 0.1
    prompts = np.array([PROMPT, 13])
    ctx = Context(
        segment_ids=jnp.array(place[:, :PROMPT] < prompts[:, None], jnp.int32),
        positions=jnp.array(place[:, :PROMPT]),
        train=False,
    )
    cache = nnx.merge(graphdef, params).init_cache(ROWS, LENGTH)
    found, cache = read(params, tokens[:, :PROMPT], ctx, cache)
    for row, length in enumerate(prompts):
        np.testing.assert_allclose(found[row, :length], whole[row, :length], atol=2e-5)
    rows = np.arange(ROWS)
    for count in range(LENGTH - PROMPT):
        at = prompts + count
        ctx = Context(positions=jnp.array(at, jnp.int32)[:, None], train=False)
        found, cache = read(params, tokens[rows, at][:, None], ctx, cache)
        np.testing.assert_allclose(found[:, 0], whole[rows, at], atol=2e-5, err_msg=f"{at}")
