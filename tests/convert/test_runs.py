"""A published model becomes a run that is evaluated, continued, tuned with adapters and exported."""

import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
import safetensors.numpy
import tokenizers
from tokenizers import models, pre_tokenizers

from effarch import config
from effarch.convert.hf import runs
from effarch.models import decoding
from effarch.models.context import Context
from effarch.training import evaluation, loop, restore, run_folder, setup

DATA = pathlib.Path(__file__).resolve().parent.parent / "data"
WORDS = [f"w{number}" for number in range(90)]


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """The small Llama with a tokenizer of as many words as it knows."""
    folder = tmp_path_factory.mktemp("published") / "small-llama"
    shutil.copytree(DATA / "model_llama", folder)
    vocab = {word: number for number, word in enumerate(["[UNK]", "<s>", "</s>", *WORDS])}
    tokenizer = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Everything but the model: a small text and two steps."""
    folder = tmp_path_factory.mktemp("text")
    draw = np.random.default_rng(0)
    for number in range(30):
        text = " ".join(draw.choice(WORDS, 150))
        (folder / f"{number}.txt").write_text(text)
    c = config.default()
    c.data.sources = (f"files:{folder}/*.txt",)
    c.data.cache_dir = str(folder / "cache")
    c.data.val_permille, c.data.seq_len, c.data.batch_size = 200, 32, 4
    c.train.num_steps, c.log.every_steps, c.optimizer.schedule.warmup_steps = 2, 1, 1
    c.log.tensorboard = False
    c.log.sample_prompts = ()
    return c


def text_fields(folder):
    """Of config.json: first and last token of a text, padding, the longest text."""
    content = json.loads((folder / "config.json").read_text())
    ids = [content[f"{name}_token_id"] for name in ("bos", "eos", "pad")]
    return [*ids, content["max_position_embeddings"]]


@pytest.mark.slow
def test_an_imported_model_is_a_run(published, base, tmp_path):
    run, out = tmp_path / "run", tmp_path / "out"
    with pytest.raises(ValueError, match="holds a model or a run already"):
        runs.import_run(published, published, base)
    runs.import_run(published, run, base)
    plan, state = restore.open_run(run)
    assert plan.dataset.tokenizer.document_token == 1
    model = restore.model_of(plan, state)
    io = np.load(DATA / "model_llama" / "io.npz")
    got = jax.jit(lambda ids: model.logits(model(ids, Context())[0]))(io["input_ids"])
    assert np.abs(np.asarray(got) - io["logits"]).max() < 1e-4
    windows = evaluation.batches(plan, max_batches=1)
    figures = evaluation.evaluate(
        plan, plan.eval_step(quantized=False), state.params, state.model_state, windows
    )
    assert 3 < figures["loss"] < 8
    drawn = list(decoding.generate(model, [[1, 5, 9]], max_tokens=3, temperature=0))
    assert np.array(drawn).shape == (3, 1)
    assert runs.export_run(run, out) == "llama"
    theirs = safetensors.numpy.load_file(published / "model.safetensors")
    written = safetensors.numpy.load_file(out / "model.safetensors")
    assert written.keys() == theirs.keys()
    for name, array in theirs.items():
        np.testing.assert_array_equal(written[name], array, err_msg=name)
    for name in ("tokenizer.json", "chat_template.jinja"):
        assert (out / name).read_text() == (published / name).read_text()
    assert text_fields(out) == text_fields(published) == [1, 2, None, 64]
    with pytest.raises(ValueError, match="holds a model or a run already"):
        runs.export_run(run, out)


@pytest.mark.slow
def test_adapters_are_trained_alone_and_merged(published, base, tmp_path):
    c = config.from_json(config.to_json(base))
    c.model.lora.rank, c.model.lora.alpha = 3, 6.0
    c.model.lora.paths = ("layers/1/mixer/q", "layers/*/ffn/**")
    run, out = tmp_path / "run", tmp_path / "out"
    runs.import_run(published, run, c)
    plan = setup.prepare(run_folder.read_config(run))
    outcome = loop.Loop(plan, run).run()
    assert outcome.exit_code == 0 and outcome.resumes == 0
    assert json.loads((run / "metrics.jsonl").read_text().splitlines()[0])["step"] == 1
    runs.export_run(run, out)
    assert text_fields(out) == [1, [2, 1], None, 64]  # documents end by token 1 in training
    theirs = safetensors.numpy.load_file(published / "model.safetensors")
    written = safetensors.numpy.load_file(out / "model.safetensors")
    layers = {name: jax.device_get(tree) for name, tree in outcome.state.params["layers"].items()}
    for layer in range(2):
        parts = [(tree, 0) for name, tree in layers.items() if name == str(layer)]
        (tree, index), *_ = parts or [(tree, layer) for tree in layers.values()]
        for ours, name in (("mixer/q", "self_attn.q_proj"), ("ffn/up", "mlp.up_proj")):
            key = f"model.layers.{layer}.{name}.weight"
            place = tree
            for part in ours.split("/"):
                place = place[part]
            if (ours, layer) == ("mixer/q", 0):
                assert "adapter" not in place
                np.testing.assert_array_equal(written[key], theirs[key])
                continue
            down, up = (place["adapter"][part]["kernel"][index] for part in ("down", "up"))
            assert down.shape[1] == 3 and np.abs(up).max() > 0
            wanted = theirs[key].astype(np.float64) + 2.0 * (down.astype(np.float64) @ up).T
            np.testing.assert_allclose(written[key], wanted, rtol=0, atol=1e-6)
    key = "model.layers.0.input_layernorm.weight"
    np.testing.assert_array_equal(written[key], theirs[key])
