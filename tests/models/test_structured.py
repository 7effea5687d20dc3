"""Factored linear layers against dense products written in NumPy, self-guided training, and counts."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from effarch import config
from effarch.models import build, ffns, layer_structures, parameters
from effarch.models.context import Context
from effarch.models.layers import guide
from effarch.models.layers.linear import Linear
from effarch.training import optimizers
from effarch.training import state as state_lib
from effarch.training import step as step_lib

OPTIONS = layer_structures.Options("low_rank", 6, 3, 0.1, 4.0, 0, True)
FORMS = ("low_rank", "block_dense", "block_shuffle", "sltrain")
CASES = (*((form, (12, 24)) for form in FORMS), ("block_shuffle", (24, 12)))


def new(form, sizes, **changes):
    options = dataclasses.replace(OPTIONS, form=form, **changes)
    layer = Linear(*sizes, axes=("embed", "ffn"), rngs=nnx.Rngs(0))
    start = layer.kernel[...]
    layer_structures.attach(layer, options, nnx.Rngs(1))
    return layer, start


def by_hand(form, x, p, start):
    """y of one row, loop by loop, in float64."""
    down, up = (np.asarray(p[name], np.float64) for name in ("down", "up"))
    if form == "low_rank":
        return (x @ down) @ up
    if form == "sltrain":
        w = 4.0 / 6 * down @ up
        for place, value in zip(p["places"], p["sparse"]):
            w[place // w.shape[1], place % w.shape[1]] += value
        return x @ w
    blocks, inputs = down.shape[:2]
    z = [x[n * inputs : (n + 1) * inputs] @ down[n] for n in range(blocks)]
    if form == "block_dense":
        return np.concatenate(z) @ up
    flat = np.concatenate(z)
    outputs = up.shape[2]
    y = np.zeros(blocks * outputs)
    for block in range(blocks):
        mixed = np.array([flat[r * blocks + block] for r in range(up.shape[1])]) @ up[block]
        for s in range(outputs):
            y[s * blocks + block] = mixed[s]
    return y


@pytest.fixture(scope="module")
def found():
    """Of every case: its first parts, parts with random values, y, matrix, gradients, merged layer."""

    def one(form, sizes, xs, key):
        layer, start = new(form, sizes)
        first = nnx.to_pure_dict(nnx.state(layer.structure))
        if form == "sltrain":  # at first its low-rank part is 0
            layer.structure.up[...] += jax.random.normal(key, (6, sizes[1]))
        x = xs[:, : sizes[0]]
        graphdef, params, rest = nnx.split(layer, nnx.Param, ...)
        y, matrix = layer(x), layer.matrix()
        parts, grads = nnx.to_pure_dict(nnx.state(layer.structure)), {}
        if form in ("low_rank", "sltrain"):
            total = lambda params: jnp.sum(jnp.sin(nnx.merge(graphdef, params, rest)(x)))  # noqa: E731
            grads = nnx.to_pure_dict(jax.grad(total)(params))["structure"]
        layer_structures.merge(nnx.Dict(layer=layer))
        return first, parts, start, y, matrix, grads, (layer(x), layer.kernel[...])

    @jax.jit
    def run(xs, key):
        return {str(case): one(*case, xs, key) for case in CASES}

    xs = np.random.default_rng(0).standard_normal((5, 24)).astype(np.float32)
    return xs, jax.device_get(run(xs, jax.random.key(3)))


@pytest.mark.parametrize(("form", "sizes"), CASES)
def test_forms(found, form, sizes):
    """y, the matrix, the merged layer, and the gradients through the materialized matrix."""
    xs, every = found
    _, parts, start, y, matrix, grads, merged = every[str((form, sizes))]
    x = xs[:, : sizes[0]].astype(np.float64)
    want = np.stack([by_hand(form, row, parts, start) for row in x])
    np.testing.assert_allclose(y, want, atol=1e-5 * np.abs(want).max())
    dense = np.stack([by_hand(form, row, parts, start) for row in np.eye(sizes[0])])
    np.testing.assert_allclose(matrix, dense, atol=1e-5 * np.abs(dense).max())
    np.testing.assert_allclose(merged[0], want, atol=1e-5 * np.abs(want).max())
    np.testing.assert_allclose(merged[1], dense, atol=1e-5 * np.abs(dense).max())

    dw = x.T @ np.cos(want)  # of sum(sin(y))
    down, up = parts["down"].astype(np.float64), parts["up"].astype(np.float64)
    if form in ("low_rank", "sltrain"):
        scale = 1.0 if form == "low_rank" else 4.0 / 6
        np.testing.assert_allclose(grads["down"], scale * dw @ up.T, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(grads["up"], scale * down.T @ dw, rtol=1e-4, atol=1e-5)
    if form == "sltrain":
        np.testing.assert_allclose(grads["sparse"], dw.reshape(-1)[parts["places"]], rtol=1e-4)


def test_first_values(found):
    """Truncated singular vectors; orthogonal blocks; sorted places, each once; B of sltrain 0."""
    every = {case: found[1][str(case)] for case in CASES}
    first, _, start, *_ = every["low_rank", (12, 24)]
    left, values, right = np.linalg.svd(start)
    best = (left[:, :6] * values[:6]) @ right[:6]
    np.testing.assert_allclose(first["down"] @ first["up"], best, atol=1e-6)
    norms = np.linalg.norm(
        first["down"], axis=0
    )  # both factors carry the root of the singular value
    np.testing.assert_allclose(norms, np.sqrt(values[:6]), rtol=1e-4)
    for case in (
        ("block_dense", (12, 24)),
        ("block_shuffle", (12, 24)),
        ("block_shuffle", (24, 12)),
    ):
        first = every[case][0]
        ups = first["up"] if first["up"].ndim == 3 else first["up"][None]
        for block in (*first["down"], *ups):
            gram = block.T @ block if block.shape[0] >= block.shape[1] else block @ block.T
            np.testing.assert_allclose(gram, np.eye(len(gram)), atol=1e-5)
    first = every["sltrain", (12, 24)][0]
    assert not first["up"].any()
    assert first["places"].shape == (28,)  # floor(0.1 * 288)
    assert (np.diff(first["places"]) > 0).all() and first["places"][-1] < 288
    assert np.abs(first["sparse"]).max() < 12**-0.5 and np.abs(first["down"]).max() < 12**-0.5


def test_guide():
    """At step 0 the factored layer, then alpha x W + (1 - alpha) S(x), from step 8 on S(x)."""

    @jax.jit
    def run(x, bump, chances):
        out = {}
        for form in ("low_rank", "block_shuffle"):
            plain = new(form, (12, 24))[0](x)
            layer = new(form, (12, 24), guided_steps=8)[0]
            same = [layer(x) - plain]
            layer.guide.kernel[...] += bump
            ys = []
            for progress in (0, 2, 8, 9):
                layer.guide.progress[...] = jnp.int32(progress)
                ys.append(layer(x))
            layer.guide.progress[...] = jnp.int32(2)
            for chance in chances:
                layer.guide.chance = chance
                ys.append(layer(x))
            out[form] = plain, same[0], jnp.stack(ys), layer.matrix(), x @ bump
        return out

    rng = np.random.default_rng(0)
    x, bump = rng.standard_normal((3, 12), np.float32), rng.standard_normal((12, 24), np.float32)
    quarter = 0.5 * (1 + math.cos(math.pi / 4))
    for form, (plain, same, ys, matrix, extra) in jax.device_get(
        run(x, bump, np.float32([quarter - 0.01, quarter + 0.01]))
    ).items():
        np.testing.assert_allclose(same, 0, atol=1e-5, err_msg=form)
        for y, alpha in zip(ys, (1.0, quarter, 0.0, 0.0, quarter, 0.0)):
            np.testing.assert_allclose(y, plain + alpha * extra, atol=1e-4, err_msg=form)
        np.testing.assert_allclose(x @ matrix, plain + quarter * extra, atol=1e-4)


def ffn_counts(width, hidden, **options):
    ffn = nnx.eval_shape(
        lambda: ffns.KINDS["structured_mlp"](width, hidden=hidden, rngs=nnx.Rngs(0), **options)
    )
    params = sum(x.size for x in jax.tree.leaves(nnx.state(ffn, nnx.Param)))
    return params, sum(layer.forward_flops(1) for layer in (ffn.up, ffn.down))


@pytest.mark.parametrize(
    ("options", "params", "share"),
    [
        (dict(form="low_rank", rank=384), 2 * 384 * (768 + 3072), 0.625),
        (dict(form="low_rank", rank=192), 2 * 192 * (768 + 3072), 0.3125),
        (dict(form="block_shuffle", blocks=2), 2 * 768 * (768 + 3072) // 2, 0.625),
        (dict(form="block_shuffle", blocks=4), 2 * 768 * (768 + 3072) // 4, 0.3125),
        (dict(form="block_dense", blocks=2, rank=512), 512 * (384 + 3072 + 1536 + 768), 0.625),
        (dict(form="block_dense", blocks=2, rank=256), 256 * (384 + 3072 + 1536 + 768), 0.3125),
    ],
)
def test_counts(options, params, share):
    """StructuredFFN's 63 % and 32 % of an MLP from 768 to 3072; FLOPs are twice the parameters."""
    assert ffn_counts(768, 3072, **options) == (params, 2 * params)
    assert params == share * 2 * 768 * 3072


def test_counts_of_sltrain():
    """0.53 of a dense square of 512 at rank 128; its FLOPs stay those of the dense layer."""
    params, flops = ffn_counts(512, 512, form="sltrain", rank=128)
    assert params == 2 * (128 * 1024 + math.floor(0.03 * 512 * 512))
    assert params / (2 * 512 * 512) == pytest.approx(0.53, abs=1e-3)
    assert flops == 4 * 512 * 512


def model_config(depth=2, **structured):
    m = config.default().model
    m.width, m.depth, m.layers = 16, depth, "attention/mlp"
    m.blocks.attention.num_heads, m.blocks.mlp.hidden = 2, 32
    m.structured.update(structured)
    return m


def test_layers_by_path():
    """Only the layers that are named, with public paths, each block a matrix to an optimizer."""
    c = model_config(form="block_dense", rank=8, blocks=2, paths=("layers/1/mixer/q", "**/down"))
    plan = state_lib.blueprint(c, vocab_size=11)
    infos = {path: info for info in jax.tree.leaves(plan.params) for path in info.public_paths}
    assert infos["layers/1/mixer/q/structure/down"].shape == (1, 2, 8, 4)
    assert infos["layers/0/ffn/down/structure/up"].shape == (1, 8, 16)
    assert "layers/0/mixer/q/kernel" in infos and "layers/0/ffn/up/kernel" in infos
    assert "layers/0/ffn/down/kernel" not in infos
    group = optimizers.groups.assign(plan.params)["layers"]["1"]["mixer"]["q"]["structure"]["down"]
    assert group.kind == "matrix" and group.matrix_dims == (2, 3)
    assert parameters.STACKING[-1] == "blocks"


@pytest.mark.parametrize(
    ("structured", "words"),
    [
        (dict(form="low_rank", rank=17), "rank=17 must be from 1 to 16"),
        (dict(form="block_shuffle", blocks=5), "blocks=5 does not divide the layer's inputs (32)"),
        (dict(form="low_rank", rank=4, paths=("layers/*/ffn/gate",)), "structured.paths[0]"),
        (dict(form="sltrain", rank=4, density=1.0), "density=1.0 must be between 0 and 1"),
        (dict(form="lowrank", rank=4), "Did you mean 'low_rank'?"),
    ],
)
def test_impossible_options_are_refused_in_words(structured, words):
    with pytest.raises(ValueError) as error:
        build.abstract(model_config(**structured), vocab_size=11)
    assert words in str(error.value)


def test_factors_are_not_quantized():
    c = config.default()
    c.quantization.recipe = "fp8_current"
    model = model_config(form="low_rank", rank=4)
    with pytest.raises(ValueError, match=r"ffn/(up|down) is factored"):
        build.abstract(model, vocab_size=11, quantization=c.quantization)


@pytest.mark.slow
def test_self_guided_training():
    """The first loss is that without guide; W fades out, drops from the program, and can be taken off;
    the support of sltrain stays."""
    tokens = np.random.default_rng(0).integers(0, 11, (4, 9)).astype(np.int32)
    ones = np.ones((4, 8), np.int32)
    batch = dict(inputs=tokens[:, :-1], targets=tokens[:, 1:], segment_ids=ones)
    batch |= dict(positions=np.broadcast_to(np.arange(8, dtype=np.int32), (4, 8)))
    batch |= dict(loss_weights=ones.astype(np.float32))
    infos = {}
    for steps in (0, 4):
        c = model_config(form="sltrain", rank=4, guided_steps=steps, reduce_flops=False)
        plan = state_lib.blueprint(c, vocab_size=11)
        schedule = lambda count: 1e-2 + 0 * count  # noqa: E731
        tx = _optimizer(plan, schedule)
        state = jax.jit(
            lambda key, c=c, tx=tx: state_lib.initial(c, vocab_size=11, seed=key, tx=tx)
        )(jax.random.key(0))
        places = jax.device_get(_places(state.model_state))
        step = jax.jit(step_lib.train_step(plan, tx, schedule, accumulate=1))
        losses = []
        for _ in range(7):
            state, metrics = step(state, batch, jax.random.key(1))
            losses.append(float(metrics["ce"]))
        infos[steps] = losses
        for before, after in zip(places, _places(state.model_state)):
            np.testing.assert_array_equal(before, after)
        if not steps:
            continue
        probes = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), plan.probes)
        model = nnx.merge(plan.graphdef, state.params, probes, state.model_state)
        with_guide = model(batch["inputs"], Context(train=False))[0]
        guide.detach(model)
        without = model(batch["inputs"], Context(train=False))[0]
        np.testing.assert_allclose(without, with_guide, atol=1e-6)
        assert not [
            x for x in jax.tree.leaves(nnx.state(model, nnx.Param)) if x.shape[1:] == (16, 32)
        ]
        layer_structures.merge(model)
        np.testing.assert_allclose(
            model(batch["inputs"], Context(train=False))[0], with_guide, atol=1e-5
        )
    assert infos[4][0] == pytest.approx(infos[0][0], abs=1e-5)
    assert infos[4][-1] < infos[4][0] - 0.3
    assert np.abs(infos[4][-1] - infos[0][-1]) > 1e-4


def _optimizer(plan, schedule):
    from effarch.training import guard

    inner = optimizers.build(
        "adamw",
        schedule=schedule,
        clip_norm=1.0,
        infos=plan.params,
        rules=(),
        **optimizers.options("adamw"),
    )
    return guard.guard(inner, spike_factor=0.0)


def _places(model_state) -> list:
    found = jax.tree_util.tree_leaves_with_path(model_state)
    return [leaf for path, leaf in found if "places" in str(path)]
