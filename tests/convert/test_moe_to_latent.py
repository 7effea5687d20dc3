"""Experts into shared latents: the factorization, a converted model, a converted run that trains on."""

import json
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from effarch import config
from effarch.convert.hf import runs as hf_runs
from effarch.convert.moe_to_latent import calibration, factors, layers, runs
from effarch.models import decoding
from effarch.models.context import Context
from effarch.training import finish, loop, restore, run_folder, setup
from effarch.training import state as train_state

DATA = pathlib.Path(__file__).resolve().parent.parent / "data"
D, F, E, K, L, VOCAB = 16, 12, 4, 2, 7, 19


def draw(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).standard_normal(shape)


def test_the_residual_is_what_the_svd_discards():
    w = draw(3, D, F)
    b, a = factors.shared_in(w, L)
    singular = np.linalg.svd(np.concatenate(list(w), axis=1), compute_uv=False)
    lost = np.sum(singular[L:] ** 2) / np.sum(singular**2)
    np.testing.assert_allclose(factors.weights_lost(w, b @ a), lost, rtol=1e-8)
    np.testing.assert_allclose(np.linalg.norm(b, axis=0), np.linalg.norm(a, axis=(0, 2)))
    a, b = factors.shared_out(w.swapaxes(1, 2), L)
    np.testing.assert_allclose(factors.weights_lost(w.swapaxes(1, 2), a @ b), lost, rtol=1e-8)


def test_what_is_exact():
    """One expert a group at its own rank, and experts that share a row space."""
    w = draw(1, D, F)
    b, a = factors.shared_in(w, F)
    np.testing.assert_allclose(b @ a, w, atol=1e-12)
    planted = draw(D, L) @ draw(3, L, F)
    for moment in (None, draw(D, D) @ draw(D, D).T):
        b, a = factors.shared_in(planted, L, moment)
        np.testing.assert_allclose(b @ a, planted, atol=1e-9)


def test_fitting_outputs_loses_less_of_them_and_two_phases_more():
    w, x = draw(3, D, F), draw(400, D, seed=1) @ draw(D, D, seed=2)
    moment = x.T @ x / len(x)
    plain, whitened = (np.matmul(*factors.shared_in(w, L, m)) for m in (None, moment))
    by_hand = [np.sum((x @ (w - y)) ** 2) / np.sum((x @ w) ** 2) for y in (plain, whitened)]
    assert by_hand[1] < 0.9 * by_hand[0]
    ours = [factors.outputs_lost(w, y, moment) for y in (plain, whitened)]
    np.testing.assert_allclose(ours, by_hand, rtol=2e-3)  # the diagonal is raised by 1e-4
    assert factors.weights_lost(w, whitened) > factors.weights_lost(w, plain)
    two_phases = np.matmul(*factors.shared_in(factors.reduced(w, 3), L))
    assert factors.weights_lost(w, two_phases) > factors.weights_lost(w, plain)


def model_config():
    m = config.default().model
    m.width, m.depth, m.layers = D, 2, "attention/moe"
    m.blocks.attention.num_heads = 2
    m.blocks.moe.update(num_experts=E, top_k=K, hidden=F)
    return m


def planted_model():
    """A model whose experts share, in pairs, the spaces they read from and write to."""
    plan = train_state.blueprint(model_config(), vocab_size=VOCAB)

    def array(info):
        shape, name = info.shape, info.path.rpartition("/")[2]
        if name == "scale":
            return np.ones(shape, np.float32)
        if "experts" not in info.path:
            return np.float32(0.5 * draw(*shape))
        shared, own = ((D, L), (L, F)) if name != "down" else ((L, D), (F, L))
        shared, own = draw(shape[0], E // 2, 1, *shared), draw(shape[0], E // 2, 2, *own)
        product = shared @ own if name != "down" else own @ shared
        return np.float32(0.1 * product.reshape(shape))  # [repeats, E, in, out]

    params = jax.tree.map(array, plan.params)
    state = jax.tree.map(lambda info: np.zeros(info.shape, np.float32), plan.model_state)
    return nnx.merge(plan.graphdef, params, plan.probes, state), params, state


@pytest.mark.slow
@pytest.mark.ci
def test_a_planted_model_is_converted_exactly():
    """Version 2 of the layer, against the model itself; and the moments against numpy."""
    model, params, state = planted_model()
    options = layers.parse(f"group_size=2,latent={L},factor=all")
    tokens = np.random.default_rng(3).integers(0, VOCAB, (2, 8)).astype(np.int32)
    segments = np.ones((2, 8), np.int32)
    segments[1, 5:] = 0
    positions = np.tile(np.arange(8, dtype=np.int32), (2, 1))
    batch = {"inputs": tokens, "segment_ids": segments, "positions": positions}
    moments = calibration.second_moments(model, [batch])
    assert set(moments) == {0, 1} and np.linalg.eigvalsh(moments[1]).min() > -1e-4
    # What enters the experts is normed.
    np.testing.assert_allclose(np.trace(moments[0]), D, rtol=1e-3)
    found, rows = layers.arrays(model, options, moments)
    assert [(row["layer"], row["matrix"]) for row in rows] == [
        (layer, name) for layer in (0, 1) for name in ("gate", "up", "down")
    ]
    assert all(value < 1e-9 for row in rows for key, value in row.items() if "lost" in key)

    wanted = layers.latent_model(model_config(), options)
    assert wanted.layers == "attention/mole"
    plan = train_state.blueprint(wanted, vocab_size=VOCAB)
    old = {
        "/".join(p.key for p in path): x for path, x in jax.tree_util.tree_leaves_with_path(params)
    }
    new = jax.tree.map(lambda info: np.float32({**old, **found}[info.path]), plan.params)

    @jax.jit
    def both(tokens, old_params, new_params, state):
        outputs = []
        for graphdef, params in ((nnx.graphdef(model), old_params), (plan.graphdef, new_params)):
            made = nnx.merge(graphdef, params, plan.probes, state)
            outputs.append(made.logits(made(tokens, Context())[0]))
        return outputs

    before, after = both(tokens, params, new, state)
    assert np.abs(after - before).max() < 1e-5 * np.abs(before).max()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("group_size=4,latnt=3", "config argument 'latnt=3' is not known"),
        ("latent=3.5", "'latent=3.5': expected a value of type int"),
    ],
)
def test_wrong_options_are_named(text, message):
    with pytest.raises(ValueError, match=message):
        layers.parse(text)


def test_a_model_without_experts_is_refused():
    m = model_config()
    m.layers = "attention/glu"
    with pytest.raises(ValueError, match="no layer of kind moe"):
        layers.latent_model(m, layers.Options())


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Everything but the model: a small text and two steps."""
    folder = tmp_path_factory.mktemp("text")
    for number in range(20):
        (folder / f"{number}.txt").write_text(f"text {number} of some words " * 40)
    c = config.default()
    c.data.sources, c.data.tokenizer = (f"files:{folder}/*.txt",), "bytes"
    c.data.cache_dir, c.data.val_permille = str(folder / "cache"), 200
    c.data.seq_len, c.data.batch_size = 32, 4
    c.train.num_steps, c.log.every_steps, c.optimizer.schedule.warmup_steps = 2, 1, 1
    c.log.tensorboard, c.log.sample_prompts = False, ()
    return c


@pytest.mark.slow
def test_a_run_is_converted_trained_and_used(base, tmp_path):
    c = config.from_json(config.to_json(base))
    c.model, c.train.num_steps = model_config(), 3
    c.model.blocks.moe.update(router="sigmoid_bias", bias_rate=0.5)
    first, second = tmp_path / "first", tmp_path / "second"
    plan = setup.prepare(c)
    run_folder.create(first, plan.config, data=plan.dataset.fingerprint)
    trained = loop.Loop(plan, first).run().state
    options = layers.parse(f"group_size=2,latent={L},calibrate=200,tie_in=1")
    runs.convert_run(first, second, options)
    for row in json.loads((second / runs.RECORD).read_text())["lost"]:
        assert 0 < row["outputs_lost"] <= row["outputs_lost_plain"] < 1
    plan, state = restore.open_run(second)
    assert int(state.step) == 0
    router = state.model_state["layers"]["0+1x2"]["ffn"]["router"]
    np.testing.assert_array_equal(
        router["bias"], trained.model_state["layers"]["0+1x2"]["ffn"]["router"]["bias"]
    )
    assert np.abs(router["bias"]).max() > 0
    drawn = list(
        decoding.generate(restore.model_of(plan, state), [[1, 5]], max_tokens=2, temperature=0)
    )
    assert np.array(drawn).shape == (2, 1)
    outcome = loop.Loop(plan, second).run()
    assert outcome.exit_code == 0 and outcome.resumes == 0
    load = finish.expert_load(plan, outcome.state.model_state)
    assert list(load) == [0, 1] and all(len(shares) == E for shares in load.values())
    np.testing.assert_allclose([sum(shares) for shares in load.values()], 1, rtol=1e-2)
    records = [json.loads(line) for line in (second / "metrics.jsonl").read_text().splitlines()]
    assert np.isfinite(records[0]["loss"]) and "metric/latent_groups" in records[0]
    with pytest.raises(ValueError, match="holds a model or a run already"):
        runs.convert_run(first, second, options)


@pytest.mark.slow
@pytest.mark.ci
def test_a_published_model_is_converted_by_the_command(tmp_path):
    """Groups of one expert at full rank: the published logits."""
    source, run = DATA / "model_mixtral", tmp_path / "run"
    flags = [f"--from={source}", f"--to={run}", "--to_latent=group_size=1,latent=32"]
    done = subprocess.run(
        [sys.executable, "-m", "effarch.convert", *flags, "--config=quickstart"],
        cwd=DATA.parent.parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "    0  gate          0.000%" in done.stdout and "attention/mole" in done.stdout
    plan = hf_runs.planned(run_folder.read_config(run))
    with setup.open_checkpoints(plan, run) as saved:
        _, state, _ = saved.restore(plan.target())
    model = restore.model_of(plan, state)
    io = np.load(source / "io.npz")
    got = jax.jit(lambda ids: model.logits(model(ids, Context())[0]))(jnp.asarray(io["input_ids"]))
    assert np.abs(np.asarray(got) - io["logits"]).max() < 1e-4
