"""A run in one process: what it leaves, stopping and resuming, bad steps."""

import json
import math
import os
import signal

import jax
import numpy as np
import pytest

from effarch.training import finish, loop, restore, run_folder, setup, writers


def train(config, folder):
    plan = setup.prepare(config)
    run_folder.create(folder, plan.config, data=plan.dataset.fingerprint)
    return plan, loop.Loop(plan, folder).run()


def lines(folder):
    """metrics.jsonl without wall-clock."""
    return [
        {name: value for name, value in record.items() if not name.startswith("time/")}
        for record in writers.read_metrics(folder)
    ]


def assert_same_run(folder, outcome, other_folder, other):
    assert lines(folder) == lines(other_folder)
    jax.tree.map(np.testing.assert_array_equal, outcome.state, other.state)


@pytest.fixture(scope="module")
def whole(make_tiny, tmp_path_factory):
    """An uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole")
    plan, outcome = train(make_tiny(), folder)
    return plan, folder, outcome


def stop_at(monkeypatch, step, number=signal.SIGTERM):
    """Sends this process a signal while the batch of a step is being made."""
    original = loop.Loop._read

    def read(self, read_step, metrics, stop):
        original(self, read_step, metrics, stop)
        if read_step == step:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(loop.Loop, "_read", read)


@pytest.mark.smoke
def test_a_run_learns_and_leaves_what_it_should(whole):
    plan, folder, outcome = whole
    finish.write(plan, folder, outcome)
    train_lines = writers.read_metrics(folder, "train")
    assert [line["step"] for line in train_lines] == list(range(1, 13))
    assert train_lines[-1]["loss"] < train_lines[0]["loss"] - 0.1
    assert train_lines[0]["loss"] == pytest.approx(math.log(320), rel=0.05)
    assert train_lines[-1]["tokens"] == 12 * 4 * 32
    assert train_lines[-1]["flops_model"] == plan.counts.flops_per_token * 12 * 128
    evaluations = writers.read_metrics(folder, "eval")
    assert [line["step"] for line in evaluations] == [5, 10, 12]
    last = evaluations[-1]
    # One byte a token and none for a document's end.
    assert last["bits_per_byte"] == pytest.approx(
        last["loss"] / math.log(2) * last["tokens"] / last["bytes"]
    )
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["status"] == "finished"
    assert summary["val/loss"] == last["loss"]
    assert summary["flops_model"] == plan.counts.flops_per_token * 12 * 128
    assert summary["flops_hw"] > summary["flops_model"]
    assert summary["backend/attention"] == summary["backend/linear_cross_entropy"] == "xla"
    assert {"gzip_bits_per_byte", "xz_bits_per_byte", "seconds", "resumes"} <= set(summary)
    assert (folder / "samples" / "00.txt").read_text().startswith("the ")
    assert "<svg" in (folder / "report.html").read_text()


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow)],
)
def test_a_signal_saves_and_the_resumed_run_is_equal_bit_for_bit(
    whole, tiny, tmp_path, monkeypatch, number, code
):
    _, whole_folder, whole_outcome = whole
    folder = tmp_path / "stopped"
    with monkeypatch.context() as patch:
        stop_at(patch, 6, number)
        _, stopped = train(tiny, folder)
    assert stopped.exit_code == code
    assert 6 <= int(stopped.state.step) <= 8
    _, resumed = train(tiny, folder)
    assert resumed.exit_code == 0
    assert resumed.resumes == 1
    assert_same_run(folder, resumed, whole_folder, whole_outcome)


@pytest.mark.smoke
def test_a_crash_loses_only_what_came_after_the_last_checkpoint(whole, tiny, tmp_path, monkeypatch):
    _, whole_folder, whole_outcome = whole
    folder = tmp_path / "crashed"

    def fail(self, step, metrics, stop):
        if step == 10:
            raise RuntimeError("power cut")
        original(self, step, metrics, stop)

    original = loop.Loop._read
    with monkeypatch.context() as patch:
        patch.setattr(loop.Loop, "_read", fail)
        with pytest.raises(RuntimeError, match="power cut"):
            train(tiny, folder)
    assert lines(folder)[-1]["step"] == 9
    _, resumed = train(tiny, folder)
    assert_same_run(folder, resumed, whole_folder, whole_outcome)


def test_training_a_finished_run_again_changes_nothing(whole, tiny):
    _, folder, outcome = whole
    before = lines(folder)
    _, again = train(tiny, folder)
    assert lines(folder) == before
    jax.tree.map(np.testing.assert_array_equal, again.state, outcome.state)


def test_another_config_and_other_data_are_refused_in_the_same_folder(whole, tiny):
    plan, folder, _ = whole
    tiny.optimizer.learning_rate = 3e-3
    tiny.log.every_steps = 7
    with pytest.raises(ValueError, match="holds the run of another config") as error:
        train(tiny, folder)
    assert "optimizer.learning_rate: 0.001 there, 0.003 here" in str(error.value)
    assert "log" not in str(error.value)
    with pytest.raises(ValueError, match="trained on other data"):
        run_folder.create(folder, plan.config, data="0" * 64)


def test_two_processes_cannot_train_in_one_folder(tmp_path):
    with (
        run_folder.locked(tmp_path),
        pytest.raises(run_folder.FolderInUse, match="in use by another process"),
        run_folder.locked(tmp_path),
    ):
        pass
    with run_folder.locked(tmp_path):
        pass


def test_bad_steps_in_a_row_end_the_run_with_a_list_of_batches(tiny, tmp_path, monkeypatch):
    tiny.train.max_bad_steps = 3
    original = loop.batches.pipeline.TrainBatches.rows

    def poisoned(self, step, start, stop):
        batch = original(self, step, start, stop)
        if step >= 5:
            batch["loss_weights"] = batch["loss_weights"] * np.float32(np.nan)
        return batch

    monkeypatch.setattr(loop.batches.pipeline.TrainBatches, "rows", poisoned)
    with pytest.raises(loop.BadSteps, match=r"train\.max_bad_steps=3"):
        train(tiny, tmp_path)
    listed = json.loads((tmp_path / "bad_batches.json").read_text())["steps"]
    assert list(listed) == ["6", "7", "8"]
    assert len(listed["6"]) == 4
    monkeypatch.undo()
    tiny.train.max_bad_steps = 3
    _, outcome = train(tiny, tmp_path)  # the last good checkpoint is there
    assert int(outcome.state.step) == 12
    assert np.isfinite(lines(tmp_path)[-1]["loss"])


def test_a_run_of_an_older_version_goes_on(whole, tiny, tmp_path, monkeypatch):
    """Fields that it did not know yet have their defaults; it keeps the fingerprint of its time."""
    _, whole_folder, whole_outcome = whole
    with monkeypatch.context() as patch:
        patch.setattr(run_folder.config_lib, "fingerprint", lambda config: "0123456789abcdef")
        stop_at(patch, 6)
        train(tiny, tmp_path)
    path = tmp_path / run_folder.CONFIG
    content = json.loads(path.read_text())
    del content["config"]["model"]["z_loss"], content["config"]["data"]["task"]
    path.write_text(json.dumps(content))
    _, state = restore.open_run(tmp_path)
    assert 6 <= int(state.step) < 12
    _, resumed = train(tiny, tmp_path)
    assert_same_run(tmp_path, resumed, whole_folder, whole_outcome)


def test_open_run_restores_what_was_trained(whole):
    _, folder, outcome = whole
    _, state = restore.open_run(folder)
    jax.tree.map(np.testing.assert_array_equal, state, outcome.state)
    _, earlier = restore.open_run(folder, step=8)
    assert int(earlier.step) == 8
    with pytest.raises(ValueError, match="not a run folder"):
        restore.open_run(folder / "samples")
