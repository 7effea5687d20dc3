"""The command on a small run, and what the report page shows of its results."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from effarch import config
from effarch.training import report_page

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent


def test_the_page_shows_figures_of_analyses(tmp_path):
    """Those that are whole; the others are left out without a word."""
    run = tmp_path / "run"
    (run / "analysis").mkdir(parents=True)
    (run / "metrics.jsonl").write_text('{"kind": "train", "step": 1, "loss": 2.0}\n')
    curve = dict(label="KL", x=[0, 1, 2], y=[0.5, None, 0.1])
    shared = dict(unit="nats", across="layer", scale="zero")
    whole = dict(title="A lens <of> logits", curves=[curve], **shared)
    broken = dict(title="Broken", curves=[dict(label="KL", x=[0, 1])], **shared)
    (run / "analysis/depth.json").write_text(json.dumps({"figures": [whole, broken]}))
    page = report_page.write_report([run], tmp_path / "page.html").read_text()
    assert "Inside the model" in page and "A lens &lt;of&gt; logits" in page
    assert "Broken" not in page and "<script" not in page


def call(*arguments):
    return subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A model of two layers after 12 steps on bytes, with checkpoints 4, 8 and 12."""
    folder = tmp_path_factory.mktemp("analysed")
    for number in range(20):
        (folder / f"{number}.txt").write_text("the quick brown fox jumps. " * (5 + number))
    c = config.default()
    c.data.sources = (f"files:{folder}/*.txt",)
    c.data.tokenizer, c.data.val_permille = "bytes", 200
    c.data.cache_dir = str(folder / "cache")
    c.data.seq_len, c.data.batch_size = 32, 4
    c.model.width, c.model.depth, c.model.layers = 16, 2, "attention/glu"
    c.model.blocks.attention.num_heads, c.model.blocks.glu.hidden = 2, 32
    c.train.num_steps, c.optimizer.schedule.warmup_steps = 12, 2
    c.eval.every_steps, c.checkpoint.every_steps, c.checkpoint.keep_period = 0, 4, 4
    c.log.tensorboard, c.log.sample_prompts = False, ()
    (folder / "config.json").write_text(config.to_json(c))
    done = call("effarch.train", f"--config={folder}/config.json", f"--workdir={folder}/run")
    assert done.returncode == 0, done.stderr
    return folder / "run"


@pytest.mark.slow
def test_everything_of_a_run(run_folder):
    done = call("effarch.analysis", f"--run={run_folder}", "--rows=3")
    assert done.returncode == 0, done.stderr
    found = {path.stem: json.loads(path.read_text()) for path in run_folder.glob("analysis/*.json")}
    assert set(found) == {"sparsity", "massive", "sinks", "depth"}
    assert sorted(found["sparsity"]["checkpoints"], key=int) == ["4", "8", "12"]
    last = found["sparsity"]["checkpoints"]["12"]
    assert 1 < last["ppl_ratio"] <= 1.0105 and last["cett"] > 0
    assert all(0 < share < 1 for share in last["active_ratio"])
    assert found["massive"]["steps"] == [4, 8, 12]
    assert np.min(found["massive"]["ratio"]) > 1
    shares = found["sinks"]["layers"]["1"]["first_share"]
    assert len(shares) == 2 and 0 < min(shares) < 1
    assert found["depth"]["lens"]["kl"][-1] == 0 < found["depth"]["lens"]["kl"][0]
    assert len(list(run_folder.glob("analysis/*.png"))) == 8
    page = (run_folder / "report.html").read_text()
    assert "Massive activations over training" in page and "Logit lens" in page


@pytest.mark.slow
def test_mistakes_end_in_one_sentence(run_folder, tmp_path):
    for arguments, words in (
        ((f"--run={run_folder}", "--what=sniks"), "Did you mean 'sinks'?"),
        ((f"--run={tmp_path}",), "is not a run folder"),
        ((f"--run={run_folder}", "--step=5", "--what=sinks"), "5"),
    ):
        done = call("effarch.analysis", *arguments)
        assert done.returncode == 2 and words in done.stderr
        assert done.stderr.count("\n") == 1
