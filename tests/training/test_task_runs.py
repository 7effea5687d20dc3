"""Runs on tasks: what they report, stopping and resuming, scoring at another length."""

import json

import jax
import numpy as np
import pytest

from effarch import config, config_check
from effarch.configs import tasks as shipped
from effarch.data import tasks
from effarch.models.context import Context
from effarch.training import evaluation, finish, loop, restore, run_folder, setup, writers


def tiny(num_steps=8):
    """Parity in 12 tokens, by one layer of attention."""
    c = config.default()
    c.name = "tiny-task"
    c.data.task.name, c.data.task.state_tracking.group = "state_tracking", "Z2"
    c.data.task.num_validation = 20
    c.data.seq_len, c.data.batch_size = 12, 8
    c.model.width, c.model.depth, c.model.layers = 16, 1, "attention/none"
    c.model.blocks.attention.num_heads = 2
    c.optimizer.schedule.warmup_steps = 2
    c.train.num_steps, c.eval.every_steps, c.checkpoint.every_steps = num_steps, 4, 4
    c.log.every_steps, c.log.tensorboard = 1, False
    return c


def train(c, folder, *, until=None):
    """Trains, to be told to stop after step `until`."""
    plan = setup.prepare(c)
    run_folder.create(folder, plan.config, data=plan.dataset.fingerprint)
    run = loop.Loop(plan, folder)
    if until is not None:
        read = run._read

        def stopping(step, metrics, stop):
            read(step, metrics, stop)
            run._signal = 15 if step >= until else None

        run._read = stopping
    return plan, run.run()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole-task")
    return folder, *train(tiny(), folder)


def test_accuracy_is_that_of_the_models_best_words(whole):
    """Against logits and numpy's argmax, on every scored example."""
    _, plan, outcome = whole
    model = restore.model_of(plan, outcome.state)
    scored = plan.dataset.validation
    ctx = Context(
        segment_ids=np.ones(scored.inputs.shape, np.int32),
        positions=np.tile(np.arange(12, dtype=np.int32), (20, 1)),
        train=False,
    )
    logits = jax.jit(lambda tokens: model.logits(model(tokens, ctx)[0]))(scored.inputs)
    is_right = np.argmax(logits, axis=-1) == scored.targets
    assert outcome.final["accuracy"] == pytest.approx(is_right.mean())
    assert outcome.final["exact_match"] == pytest.approx(is_right.all(axis=1).mean())
    log_p = jax.nn.log_softmax(logits)
    loss = -np.take_along_axis(np.asarray(log_p), scored.targets[..., None], -1).mean()
    assert outcome.final["loss"] == pytest.approx(loss, rel=1e-5)
    assert outcome.final["tokens"] == 240
    assert "bits_per_byte" not in outcome.final


def test_summary_and_report_show_it(whole):
    folder, plan, outcome = whole
    finish.write(plan, folder, outcome)
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["val/accuracy"] == outcome.final["accuracy"]
    assert [line["step"] for line in writers.read_metrics(folder, "eval")] == [4, 8]
    page = (folder / "report.html").read_text()
    assert f"{outcome.final['accuracy']:.1%}" in page
    assert "Exact match" in page
    assert not (folder / "samples").exists()


def test_a_stopped_run_goes_on_bit_for_bit(whole, tmp_path):
    folder, _, outcome = whole
    _, stopped = train(tiny(), tmp_path / "run", until=3)
    assert stopped.exit_code == 143
    _, resumed = train(tiny(), tmp_path / "run")
    assert resumed.resumes == 1
    jax.tree.map(np.testing.assert_array_equal, resumed.state, outcome.state)
    assert resumed.final == outcome.final
    plain = [
        [
            {name: x for name, x in record.items() if not name.startswith("time/")}
            for record in writers.read_metrics(path)
        ]
        for path in (folder, tmp_path / "run")
    ]
    assert plain[0] == plain[1]


def test_scoring_at_another_length(whole):
    """Parity of twice the length: more targets, from the same generator."""
    _, plan, outcome = whole
    longer = plan.with_seq_len(24)
    assert longer.dataset.validation.inputs.shape == (20, 24)
    windows = evaluation.batches(longer)
    state = outcome.state
    figures = evaluation.evaluate(
        longer, longer.eval_step(), state.params, state.model_state, windows
    )
    assert figures["tokens"] == 480
    assert plan.config.data.seq_len == 12


@pytest.mark.parametrize("task", shipped.TASKS)
def test_shipped_configs_can_be_planned(task):
    c = shipped.get_config(f"task={task},mixer=gla")
    finished = config_check.finish(c, num_devices=1)
    assert config.fingerprint(config.from_json(config.to_json(finished))) == config.fingerprint(c)
    tasks.KINDS[task](c.data.seq_len, **c.data.task[task])


def test_every_task_is_shipped():
    assert set(shipped.TASKS) == set(tasks.KINDS)


@pytest.mark.slow
def test_attention_learns_recall(tmp_path):
    c = shipped.get_config("task=mqar,mixer=attention")
    c.train.num_steps, c.eval.every_steps, c.checkpoint.every_steps = 250, 0, 0
    c.log.tensorboard = False
    _, outcome = train(c, tmp_path / "run")
    assert outcome.final["accuracy"] > 0.95
    assert outcome.final["16_pairs/accuracy"] > 0.9
