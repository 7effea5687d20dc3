"""Recipes in models: which layers get them, how stacks are cut, state, randomness, start and tail."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from effarch import config, config_check
from effarch.models import build, parameters
from effarch.models import state as state_lib
from effarch.models.context import Context
from effarch.models.layers import linear, quantizer
from effarch.quantization import recipes
from effarch.training import guard
from effarch.training import state as train_state
from effarch.training import step as step_lib

VOCAB = 32
KEY = jax.random.key(1)
FFN = {"ffn/down", "ffn/gate", "ffn/up"}
ATTENTION = {"mixer/k", "mixer/out", "mixer/q", "mixer/v"}


def model_config(layers="attention/glu", depth=2, **changes):
    c = config.default().model
    c.width, c.depth, c.layers, c.init_std = 32, depth, layers, 0.2
    c.blocks.attention.num_heads = 2
    c.blocks.gated_delta_net.update(num_heads=2, head_dim=16, expand_v=1.0)
    c.blocks.glu.hidden = 32
    c.update(changes)
    return c


def section(recipe="none", *rules, **options):
    q = config.default().quantization
    q.recipe, q.rules = recipe, rules
    q.quest.rotate, q.fp8_block.block_size, q.fp8_delayed.history = 32, 32, 3
    q.update(options)
    return q


def quantized_paths(model_section, quantization):
    """Public paths of the layers that have a quantizer."""
    model = build.abstract(model_section, vocab_size=VOCAB, quantization=quantization)
    found = set()
    for path, node in nnx.iter_graph(model):
        if isinstance(node, quantizer.Quantizer):
            found |= set(parameters.public_paths("/".join(map(str, path[:-1]))))
    return found


def paths(layer, names):
    return {f"layers/{layer}/{name}" for name in names}


def test_default_recipe_reaches_the_projections_and_nothing_else():
    layers = "first: attention/glu; repeat: gated_delta_net/none"
    got = quantized_paths(model_config(layers), section("quartet"))
    delta = {"mixer/gate", "mixer/k", "mixer/out", "mixer/q", "mixer/v"}
    assert got == paths(0, FFN | ATTENTION) | paths(1, delta)
    assert quantized_paths(model_config(layers), None) == set()
    assert quantized_paths(model_config(layers), section()) == set()


def test_later_rules_win_and_kept_layers_stay():
    model = model_config(depth=6)
    rules = ("layers/*/ffn/** mxfp8", "layers/3/** none", "layers/4/ffn/up quest bits=8")
    got = quantized_paths(model, section("none", *rules, keep_first=1, keep_last=1))
    assert got == set().union(*(paths(layer, FFN) for layer in (1, 2, 4)))
    built = build.abstract(model, vocab_size=VOCAB, quantization=section("none", *rules))
    up = next(block for name, block in built.layers.items() if name == "4").ffn.up
    assert up.quantizer.recipe.x.bits == 8 and up.quantizer.recipe.x.rotate == 32
    assert [runs[0] for runs in built.runs] == ["0+1x3", "3", "4", "5"]


def test_experts_have_one_quantizer_and_the_router_none():
    model = model_config("attention/moe")
    model.blocks.moe.update(num_experts=4, top_k=2, hidden=32, num_shared=1)
    got = quantized_paths(model, section("none", "layers/*/ffn/** quartet"))
    assert {path.split("/", 2)[2] for path in got} == {
        "ffn/experts",
        "ffn/shared/gate",
        "ffn/shared/up",
        "ffn/shared/down",
    }
    with pytest.raises(ValueError, match="ffn/experts holds experts"):
        quantized_paths(model, section("fp8_delayed"))


@pytest.mark.slow
@pytest.mark.ci
def test_the_products_of_latent_experts_are_rounded():
    model = model_config("attention/mole", depth=1)
    model.blocks.mole.update(num_experts=4, top_k=2, hidden=32, group_size=2, latent=32)
    quantization = section("none", "layers/*/ffn/experts mxfp4")
    outputs = []
    for options in (None, quantization):
        built = build.model(model, vocab_size=VOCAB, rngs=nnx.Rngs(0), quantization=options)
        ffn = nnx.merge(*_first_layer(built.layers["0"])).ffn
        outputs.append(
            nnx.jit(lambda ffn, x: ffn(x, Context())[0])(ffn, jax.random.normal(KEY, (1, 32, 32)))
        )
    difference = jnp.linalg.norm(outputs[1] - outputs[0]) / jnp.linalg.norm(outputs[0])
    assert 0.01 < difference < 0.5  # four bits


def _first_layer(block):
    graphdef, state = nnx.split(block)
    return graphdef, jax.tree.map(lambda x: x[0], nnx.to_pure_dict(state))


@pytest.mark.parametrize(
    ("quantization", "words"),
    [
        (section("none", "layers/*/fnn/** mxfp8"), "matches no linear layer; the nearest path is"),
        (section("none", "layers/*/ffn/**"), "must be a path pattern and a recipe"),
        (section("none", "layers/** mxfp9"), "Did you mean 'mxfp8'?"),
        (section("none", "layers/** quest bit=3"), "quest.bit is not an option"),
        (section("none", "layers/** quest bits=x"), "bits=x must be a value of type int"),
        (section("none", "layers/** quest fp4=2"), "fp4=2 must be 0 or 1"),
        (
            section("fp8_block", fp8_block=dict(block_size=128)),
            "blocks of 128 do not divide the 32",
        ),
        (section("mxfp6", native=True), "quantization.native=True: the recipe 'mxfp6'"),
    ],
)
def test_bad_rules_are_refused_in_words(quantization, words):
    with pytest.raises(ValueError, match="quantization") as error:
        build.abstract(model_config(), vocab_size=VOCAB, quantization=quantization)
    assert words in str(error.value)


def test_the_config_checks_names_and_ranges():
    for field, value, words in (
        ("recipe", "quartett", "Did you mean 'quartet'?"),
        ("keep_last", -1, "quantization.keep_last=-1 must not be negative"),
        ("tail_steps", -1, "quantization.tail_steps=-1 must not be negative"),
    ):
        c = config.default()
        c.quantization[field] = value
        with pytest.raises(ValueError, match="quantization") as error:
            config_check.finish(c)
        assert words in str(error.value)


def batch_of(rows=2, length=32, seed=0):
    tokens = np.random.default_rng(seed).integers(0, VOCAB, (rows, length + 1)).astype(np.int32)
    return {
        "inputs": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "segment_ids": np.ones((rows, length), np.int32),
        "positions": np.tile(np.arange(length, dtype=np.int32), (rows, 1)),
        "loss_weights": np.ones((rows, length), np.float32),
    }


@functools.cache
def planned(quantization_key, layers, depth, scan):
    """Blueprint, optimizer and the function that makes the first state from a key."""
    quantization = section(*quantization_key)
    model = model_config(layers, depth, scan=scan)
    plan = train_state.blueprint(model, vocab_size=VOCAB, quantization=quantization)
    tx = guard.guard(optax.sgd(0.1), spike_factor=0.0)
    make = functools.partial(
        train_state.initial, model, vocab_size=VOCAB, tx=tx, quantization=quantization
    )
    return plan, tx, lambda key: make(seed=key)


def start(*quantization, layers="attention/glu", depth=1, scan="never", abstract=False, **options):
    """The jitted step and the first state, or its shapes."""
    plan, tx, make = planned(quantization, layers, depth, scan)
    state = jax.eval_shape(make, KEY) if abstract else jax.jit(make)(jax.random.key(0))
    step = step_lib.train_step(plan, tx, optax.constant_schedule(0.1), accumulate=1, **options)
    return jax.jit(step), state


def by_public_path(params):
    found = {}
    for key_path, array in jax.tree_util.tree_leaves_with_path(params):
        for index, path in enumerate(parameters.public_paths(parameters.path_of(key_path))):
            found[path] = np.asarray(array[index] if path.startswith("layers/") else array)
    return found


def test_initial_parameters_do_not_depend_on_recipes():
    _, plain = start("none", depth=3)
    _, cut = start("none", "layers/1/ffn/** mxfp4", depth=3)
    one, other = by_public_path(plain.params), by_public_path(cut.params)
    assert set(cut.params["layers"]) == {"0", "1", "2"} and set(plain.params["layers"]) == {"0+1x3"}
    assert one.keys() == other.keys()
    for path in one:
        np.testing.assert_array_equal(one[path], other[path], err_msg=path)


@pytest.mark.slow
def test_scanned_layers_round_as_unrolled_ones_do():
    """Stochastic rounding included, and under rematerialization."""
    results = {}
    for scan in ("never", "always"):
        step, state = start("none", "layers/*/ffn/up quartet", depth=2, scan=scan)
        results[scan] = step(state, batch_of(), KEY)[0].params
    for one, other in zip(*map(jax.tree.leaves, results.values())):
        np.testing.assert_array_equal(one, other)


@pytest.mark.slow
@pytest.mark.ci
def test_a_step_repeats_bit_for_bit_and_its_rounding_is_drawn_anew_each_step():
    step, state = start("none", "layers/*/ffn/up quartet", depth=2, scan="never")
    first, again = step(state, batch_of(), KEY)[0], step(state, batch_of(), KEY)[0]
    jax.tree.map(np.testing.assert_array_equal, first.params, again.params)
    later = state._replace(step=state.step + 1)
    other = step(later, batch_of(), KEY)[0]
    name = "0+1x2"
    up = [s.params["layers"][name]["ffn"]["up"]["kernel"] for s in (first, other)]
    assert not np.array_equal(*up)


@functools.partial(jax.jit, static_argnums=0)
def layer_step(graphdef, params, probes, state, x):
    """The cotangents of a layer's parameters and probes, and its next model state."""

    def loss(params, probes):
        return jnp.sum(nnx.merge(graphdef, params, probes, state)(x) ** 2)

    grads, seen = jax.grad(loss, argnums=(0, 1))(params, probes)
    module = nnx.merge(graphdef, params, probes, state).quantizer
    own = module.next_state(state["quantizer"], {}, seen["quantizer"])
    return grads, seen["quantizer"]["seen"], {"quantizer": own}


def quantized_layer(recipe):
    layer = linear.Linear(32, 32, axes=("embed", "ffn"), init_std=0.2, rngs=nnx.Rngs(0))
    quantizer.attach(layer, {"": recipe})
    graphdef, *parts = nnx.split(layer, nnx.Param, state_lib.Probe, state_lib.ModelState)
    return graphdef, *map(nnx.to_pure_dict, parts)


def test_delayed_scales_follow_the_largest_magnitude_of_the_history():
    """Those of x, w and dL/dy in three steps; the scale of a step is that of the steps before."""
    graphdef, params, probes, state = quantized_layer(recipes.fp8_delayed(history=3))
    history = []
    for number in range(5):
        x = (5 - number) * jax.random.normal(jax.random.key(number), (8, 32))
        before = state["quantizer"]
        _, seen, state = layer_step(graphdef, params, probes, state, x)
        after = state["quantizer"]
        history.insert(0, np.asarray(seen))
        np.testing.assert_array_equal(seen[:2], [np.abs(x).max(), np.abs(params["kernel"]).max()])
        assert seen[2] > 1
        np.testing.assert_array_equal(after["history"][:, 0], seen)
        np.testing.assert_array_equal(after["history"][:, 1:], before["history"][:, :-1])
        np.testing.assert_array_equal(after["largest"], np.max(history[:3], axis=0))


def test_a_scale_stays_where_nothing_finite_was_seen():
    module = quantizer.Delayed(quantizer.Recipe(history=2))
    state = {
        "history": jnp.array([[[3.0, 2], [0, 0], [5, 1]]]),
        "largest": jnp.array([[3.0, 4, 5]]),
    }
    new = module.next_state(state, {}, {"seen": jnp.array([[1.0, 0, jnp.inf]])})
    np.testing.assert_array_equal(new["history"], [[[1, 3], [0, 0], [0, 5]]])
    np.testing.assert_array_equal(new["largest"], [[3, 4, 5]])


def test_learned_steps_start_from_the_first_batch():
    graphdef, params, probes, state = quantized_layer(recipes.lsq(bits=3))
    x = 3 * np.asarray(jax.random.normal(KEY, (8, 32)))
    grads, _, first = layer_step(graphdef, params, probes, state, x)
    want = [2 * np.abs(array).mean() / np.sqrt(3) for array in (x, params["kernel"])]
    np.testing.assert_allclose(first["quantizer"]["start"], want, rtol=1e-5)
    assert (np.asarray(grads["quantizer"]["factor"]) != 0).all()
    _, _, later = layer_step(graphdef, params, probes, first, x / 2)
    np.testing.assert_array_equal(later["quantizer"]["start"], first["quantizer"]["start"])


def test_steps_without_recipes_are_plain_steps():
    """What start_step and tail_steps run: the same program as without any recipe."""
    plain, state = start("none", abstract=True)
    off, _ = start("mxfp4", abstract=True, quantized=False)
    on, _ = start("mxfp4", abstract=True)
    texts = [step.lower(state, batch_of(), KEY).as_text() for step in (plain, off, on)]
    assert texts[0] == texts[1] != texts[2]


def test_a_layer_in_a_notebook_takes_a_quantizer_and_gives_it_back():
    layer = linear.Linear(32, 32, axes=("embed", "ffn"), rngs=nnx.Rngs(0))
    x = jax.random.normal(KEY, (4, 32))
    plain = layer(x)
    quantizer.attach(layer, {"": quantizer.Recipe()})
    np.testing.assert_array_equal(layer(x), plain)
    quantizer.detach(layer)
    quantizer.attach(layer, {"": recipes.build("mxfp4")})
    assert 0.01 < jnp.std(layer(x) - plain) / jnp.std(plain) < 0.3
    quantizer.detach(layer)
    quantizer.prepare(layer, Context())
    np.testing.assert_array_equal(layer(x), plain)


def test_tokens_that_blocks_do_not_divide_are_refused():
    step, state = start("none", "layers/*/ffn/up mxfp8", abstract=True)
    with pytest.raises(ValueError, match="blocks of 32") as error:
        step.lower(state, batch_of(rows=1, length=24), KEY)
    assert "data.seq_len" in str(error.value)
