"""The whole model: scanned equals unrolled, packing, decoding, remat, norms, heads."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from effarch import config
from effarch.models import build, decoding, parameters
from effarch.models.context import Context

VOCAB = 64


def tiny(**changes):
    c = config.default().model
    c.width, c.depth = 32, 6
    c.layers = "first: attention/glu; repeat: gated_delta_net/glu + attention/none"
    c.init_std = 0.2
    c.blocks.attention.update(num_heads=2)
    c.blocks.gated_delta_net.update(num_heads=2, head_dim=8)
    c.blocks.glu.hidden = 48
    c.update_from_flattened_dict(changes)
    return c


def make(**changes):
    config = tiny(**changes)
    graphdef, _ = nnx.split(build.abstract(config, vocab_size=VOCAB))

    def init(key):
        return nnx.state(build.model(config, vocab_size=VOCAB, rngs=nnx.Rngs(key)))

    return nnx.merge(graphdef, jax.jit(init)(jax.random.key(0)))


def batch_of(length=24, rows=2, seed=0):
    tokens = np.random.default_rng(seed).integers(0, VOCAB, (rows, length + 1)).astype(np.int32)
    return {
        "inputs": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "segment_ids": np.ones((rows, length), np.int32),
        "positions": np.tile(np.arange(length, dtype=np.int32), (rows, 1)),
        "loss_weights": np.ones((rows, length), np.float32),
    }


def loss_and_grads(model, batch):
    graphdef, state = nnx.split(model)

    def run(params):
        total, _, aux = nnx.merge(graphdef, params).loss(batch, Context())
        return total, aux

    (loss, aux), grads = jax.jit(jax.value_and_grad(run, has_aux=True))(nnx.to_pure_dict(state))
    return loss, grads, aux


@pytest.mark.slow
def test_scanned_and_unrolled_are_equal():
    """But for the last bit: XLA fuses the two programs differently."""
    scanned = loss_and_grads(make(scan="always"), batch_of())
    unrolled = loss_and_grads(make(scan="never"), batch_of())
    np.testing.assert_allclose(scanned[0], unrolled[0], rtol=1e-6)
    for a, b in zip(*map(jax.tree.leaves, (scanned[1:], unrolled[1:]))):
        assert jnp.sqrt(jnp.mean((a - b) ** 2)) <= 1e-5 * jnp.sqrt(jnp.mean(b**2))


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["full", "dots", "selective", "names:q,ffn_up"])
def test_remat_changes_no_number_that_matters(remat):
    want = loss_and_grads(make(), batch_of())
    got = loss_and_grads(make(remat=remat), batch_of())
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-4), got, want)


def test_a_stack_holds_what_single_layers_would():
    """Layer 3 of the stacked model, taken out, computes what the stack computes there."""
    model = build.abstract(tiny(), vocab_size=VOCAB)
    infos = parameters.describe(nnx.state(model, nnx.Param))
    public = sorted(path for info in jax.tree.leaves(infos) for path in info.public_paths)
    assert len(set(public)) == len(public)
    assert {int(path.split("/")[1]) for path in public if path.startswith("layers")} == set(
        range(6)
    )
    for info in jax.tree.leaves(infos):
        stacked = info.path.startswith("layers/")
        assert (info.logical[0] == "layers") == stacked
        assert len(info.public_paths) == (info.shape[0] if stacked else 1)
        assert len(info.logical) == len(info.shape)


@pytest.mark.slow
def test_layers_start_from_different_weights():
    kernel = make().layers["1+2x2"].mixer.q.kernel[...]
    assert kernel.shape[0] == 2
    assert float(jnp.abs(kernel[0] - kernel[1]).max()) > 0.1


@pytest.mark.slow
@pytest.mark.ci
def test_packed_documents_equal_separate_documents():
    model = make()
    graphdef, state = nnx.split(model)
    lengths, one = (9, 1, 14), batch_of(24, rows=1)
    bounds = np.cumsum((0, *lengths))
    packed = dict(one)
    packed["segment_ids"] = np.repeat([1, 2, 3], lengths)[None].astype(np.int32)
    packed["positions"] = np.concatenate([np.arange(n) for n in lengths])[None].astype(np.int32)

    def alone(start, stop):
        """One document from the first token of its row on, the rest empty."""
        part = {name: np.zeros_like(rows) for name, rows in packed.items()}
        for name, rows in packed.items():
            part[name][:, : stop - start] = rows[:, start:stop]
        part["segment_ids"][:, : stop - start] = 1
        return part

    def loss(params, batch):
        return nnx.merge(graphdef, params).loss(batch, Context())[0]

    grad = jax.jit(jax.value_and_grad(loss))
    params = nnx.to_pure_dict(state)
    value, grads = grad(params, packed)
    parts = [grad(params, alone(*ends)) for ends in zip(bounds[:-1], bounds[1:])]
    total = sum(part_value for part_value, _ in parts)
    summed = jax.tree.map(lambda *leaves: sum(leaves), *(part_grads for _, part_grads in parts))
    np.testing.assert_allclose(value, total, rtol=1e-6)
    for got, want in zip(jax.tree.leaves(grads), jax.tree.leaves(summed)):
        assert jnp.sqrt(jnp.mean((got - want) ** 2)) < 1e-4 * jnp.sqrt(jnp.mean(want**2)) + 1e-7


@pytest.mark.slow
@pytest.mark.ci
def test_greedy_decoding_by_cache_equals_the_full_forward():
    model = make()
    prompts = [[1, 2, 3, 4, 5], [7, 8]]
    drawn = np.stack(list(decoding.generate(model, prompts, max_tokens=12, temperature=0)), axis=1)
    graphdef, state = nnx.split(model)

    @jax.jit
    def logits(state, tokens):
        model = nnx.merge(graphdef, state)
        return model.logits(model(tokens, Context(train=False))[0])

    for prompt, tokens in zip(prompts, drawn):
        whole = np.zeros((1, 24), np.int32)
        whole[0, : len(prompt) + 12] = [*prompt, *tokens]
        best = np.argmax(logits(state, whole)[0], axis=-1)
        np.testing.assert_array_equal(best[len(prompt) - 1 : len(prompt) + 11], tokens)


@pytest.mark.slow
def test_sampling_repeats_with_the_seed_and_only_with_it():
    model = make()
    options = dict(max_tokens=8, temperature=1.0, top_k=20, top_p=0.9)
    runs = [
        np.stack(list(decoding.generate(model, [[1, 2, 3]], seed=seed, **options)))
        for seed in (0, 0, 1)
    ]
    np.testing.assert_array_equal(runs[0], runs[1])
    assert (runs[0] != runs[2]).any()


def test_an_empty_prompt_is_refused():
    with pytest.raises(ValueError, match="prompt is empty"):
        next(decoding.generate(None, [[1], []], max_tokens=2))


@pytest.mark.parametrize(
    ("changes", "extra"),
    [
        ({"tied_head": False}, VOCAB * 32),
        ({"norm.embed": True}, 32),
        ({"norm.placement": "peri"}, (6 + 4) * 32),
        ({"norm.placement": "post"}, -32),
    ],
)
def test_variants_have_the_parameters_they_should(changes, extra):
    """Six mixers and four ffns: peri has one more norm for each, post no final norm."""

    def total(changes):
        model = build.abstract(tiny(**changes), vocab_size=VOCAB)
        return sum(leaf.size for leaf in jax.tree.leaves(nnx.to_pure_dict(nnx.state(model))))

    assert total(changes) - total({}) == extra


@pytest.mark.slow
@pytest.mark.parametrize("placement", ["post", "peri"])
def test_every_parameter_takes_part(placement):
    loss, grads, _ = loss_and_grads(make(**{"norm.placement": placement}), batch_of())
    assert np.isfinite(loss)
    assert all(float(jnp.abs(grad).max()) > 0 for grad in jax.tree.leaves(grads))


@pytest.mark.slow
def test_soft_cap_and_z_loss_reach_the_loss():
    def loss(model):
        graphdef, state = nnx.split(model)
        run = jax.jit(lambda state: nnx.merge(graphdef, state).loss(batch, Context())[0])
        return float(run(state))

    batch = batch_of()
    layers = {"layers": "attention/none", "depth": 1}
    plain, capped = loss(make(**layers)), loss(make(logit_softcap=2.0, **layers))
    model = make(logit_softcap=2.0, **layers)
    scores = model.logits(model(batch["inputs"], Context(segment_ids=batch["segment_ids"]))[0])
    assert float(jnp.abs(scores).max()) <= 2.0
    picked = jnp.take_along_axis(jax.nn.log_softmax(scores), batch["targets"][..., None], axis=-1)
    np.testing.assert_allclose(capped, -picked.sum(), rtol=1e-5)
    assert abs(capped - plain) > 1.0
    assert loss(make(z_loss=0.1, **layers)) > plain
