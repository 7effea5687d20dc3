"""The scheduler with processes that only pretend to train: what is started, skipped, kept apart."""

import csv
import dataclasses
import io
import json
import os
import signal
import threading
import time

import filelock
import pytest
import rich.console

from effarch import config
from effarch.sweeping import display, plan, results, schedule, status
from effarch.training import run_folder


@pytest.fixture(scope="module")
def base():
    c = config.default()
    c.data.tokenizer = "bytes"
    return c.lock()


@pytest.fixture
def runs(base, tmp_path):
    return plan.runs(base, [{"seed": seed} for seed in range(4)], tmp_path)


def finish(run):
    """What effarch.train leaves behind."""
    run.folder.mkdir(parents=True, exist_ok=True)
    saved = {"fingerprint": run.fingerprint, "config": json.loads(config.to_json(run.config))}
    run_folder.write_json(run.folder / run_folder.CONFIG, saved)
    run_folder.write_json(
        run.folder / run_folder.SUMMARY,
        {"status": "finished", "val/loss": 2.5, "val/bits_per_byte": 1.25, "seconds": 3.0},
    )
    (run.folder / "metrics.jsonl").write_text('{"step": 1000, "kind": "train", "loss": 2.25}\n')


class Job:
    def __init__(self, code, polls, id=None):
        self.code, self.polls, self.stopped, self.id = code, polls, False, id

    def poll(self):
        self.polls -= 1
        return None if self.polls > 0 and not self.stopped else 143 if self.stopped else self.code

    def stop(self):
        self.stopped = True


class Pretender:
    """Ends each run with the code that its seed is given, after some polls."""

    capacity = 2

    def __init__(self, runs, codes, *, polls=2):
        self.by_name = {run.name: run for run in runs}
        self.codes, self.polls = codes, polls
        self.started, self.beside, self.jobs, self.known = [], [], [], {}

    def start(self, name, command, log):
        run = self.by_name[name]
        code = self.codes.get(run.config.seed, 0)
        code = code.pop(0) if isinstance(code, list) else code
        self.started.append(run.config.seed)
        assert json.loads(run.config_file.read_text())["seed"] == run.config.seed
        assert command[-1] == f"--workdir={run.folder}"
        log.write_text(f"training\nerror: seed {run.config.seed}\n")
        if code == 0:
            finish(run)
        if code == 143:  # stopped after some progress
            run.folder.mkdir(exist_ok=True)
            (run.folder / "config.json").write_text("{}")
            (run.folder / "metrics.jsonl").write_text('{"step": 8, "kind": "train", "loss": 3.0}\n')
        self.jobs.append(Job(code, self.polls))
        running = [job for job in self.jobs if job.polls > 0]
        self.beside.append(len(running) - 1)
        return self.jobs[-1]

    def attach(self, id, log):
        return self.known.get(id)


def sweep(runs, launcher, **options):
    return schedule.Sweep(runs, launcher, poll_seconds=0.001, **options).run()


def test_finished_runs_are_skipped_and_the_others_share_the_places(runs):
    finish(runs[1])
    launcher = Pretender(runs, {})
    assert sweep(runs, launcher) == 0
    assert launcher.started == [0, 2, 3]
    assert max(launcher.beside) == 1
    again = Pretender(runs, {})
    assert sweep(runs, again) == 0
    assert again.started == []


def test_a_summary_of_another_config_is_not_this_run(runs, base, tmp_path):
    finish(runs[0])
    saved = json.loads((runs[0].folder / "config.json").read_text())
    saved["config"]["seed"] = 99
    (runs[0].folder / "config.json").write_text(json.dumps(saved))
    assert status.of(runs[0]) == status.STOPPED


def test_failures_are_kept_apart_and_retried_on_request(runs):
    assert sweep(runs, Pretender(runs, {2: 7})) == schedule.SOME_FAILED
    text = runs[2].failure.read_text()
    assert text.startswith("exit code 7\n")
    assert "effarch.train" in text
    assert text.endswith("error: seed 2\n")
    assert status.of(runs[2]) == status.FAILED
    assert [status.of(run) for run in runs].count(status.FINISHED) == 3
    left_alone = Pretender(runs, {})
    assert sweep(runs, left_alone) == schedule.SOME_FAILED
    assert left_alone.started == []
    retried = Pretender(runs, {})
    assert sweep(runs, retried, retry_failed=True) == 0
    assert retried.started == [2]


def test_a_run_that_was_stopped_from_outside_is_resumed(runs):
    launcher = Pretender(runs, {1: [143, 0]})
    assert sweep(runs, launcher) == 0
    assert launcher.started == [0, 1, 2, 3, 1]


def test_a_run_that_stops_without_progress_has_failed(runs):
    launcher = Pretender(runs, {1: [143, 143, 0]})
    assert sweep(runs, launcher) == schedule.SOME_FAILED
    assert launcher.started.count(1) == 2
    assert runs[1].failure.read_text().startswith("exit code 143")


def test_a_run_that_another_process_trains_is_waited_for(runs):
    """Its process outlived a sweep that was killed; when it ends the run is finished or resumed."""
    runs[0].folder.mkdir(parents=True)
    lock = filelock.FileLock(runs[0].folder / ".lock", thread_local=False)
    lock.acquire()

    launcher = Pretender(runs, {})

    def end():
        deadline = time.monotonic() + 30
        while len(launcher.started) < 2 and time.monotonic() < deadline:
            time.sleep(0.001)
        finish(runs[0])
        lock.release()

    thread = threading.Thread(target=end)
    thread.start()
    assert status.of(runs[0]) == status.RUNNING
    assert sweep(runs, launcher) == 0
    thread.join()
    assert sorted(launcher.started) == [1, 2, 3]
    assert launcher.beside[:2] == [0, 0]  # two at a time, that process among them


def test_jobs_that_a_cluster_still_has_are_taken_over(runs):
    """A sweep that was killed leaves jobs behind: one that runs, one that nobody knows any more."""
    (runs[0].root / "jobs").mkdir(parents=True)
    for run, id in ((runs[1], "17"), (runs[2], "18")):
        (run.root / "jobs" / f"{run.name}.txt").write_text(id)
    launcher = Pretender(runs, {})
    launcher.known["17"] = Job(7, polls=3)
    assert sweep(runs, launcher) == schedule.SOME_FAILED
    assert launcher.started == [0, 2, 3]
    assert runs[1].failure.read_text().startswith("exit code 7")
    assert list((runs[0].root / "jobs").glob(f"{runs[1].name}*")) == []


def test_a_signal_stops_the_runs_and_starts_no_more(runs):
    launcher = Pretender(runs, {0: 5, 1: 5}, polls=10**9)
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
    assert sweep(runs, launcher) == 143
    assert launcher.started == [0, 1]
    assert all(job.stopped for job in launcher.jobs)
    assert not any(run.failure.exists() for run in runs)


def test_results_and_display(runs, tmp_path, capsys):
    finish(runs[0])
    sweep(runs[:3], Pretender(runs, {2: 7}), shown=None)
    lines = capsys.readouterr().err
    assert f"{runs[1].name} finished  validation loss 2.5000" in lines
    assert f"{runs[2].name} failed  error: seed 2" in lines
    written = results.write(runs, tmp_path)
    assert [path.name for path in written] == ["results.csv", "report.html"]
    with open(tmp_path / "results.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["status"] for row in rows] == ["finished", "finished", "failed", "new"]
    assert [row["seed"] for row in rows] == ["0", "1", "2", "3"]
    assert rows[0]["val/loss"] == "2.5"
    assert rows[2]["val/loss"] == ""
    page = (tmp_path / "report.html").read_text()
    assert "2 runs compared" in page and "seed=0</th>" in page  # by what sets them apart
    assert runs[0].name not in page
    table = display.Display(runs)._table({runs[3].name})
    assert table.caption == "2 finished, 1 failed, 1 running"
    lines = results.table(runs).splitlines()
    assert lines[0].endswith("  changes") and lines[1].endswith("  seed=0")
    assert lines[3].endswith("  seed=2: error: seed 2")
    sweep(runs, Pretender(runs, {}))
    assert "1 of these failed, --retry_failed runs them again" in capsys.readouterr().err


def test_a_sweep_longer_than_the_terminal_shows_what_is_at_work(base, tmp_path):
    """Twelve runs on nine lines: six rows, the one that runs and the one that failed among them."""
    runs = plan.runs(base, [{"seed": seed} for seed in range(12)], tmp_path)
    for run in runs[:7]:
        finish(run)
    runs[0].folder.joinpath(run_folder.SUMMARY).unlink()
    runs[0].failure.parent.mkdir()
    runs[0].failure.write_text(f"error: {'long ' * 100}\n")
    console = rich.console.Console(
        file=io.StringIO(), force_terminal=True, width=100, height=9, color_system=None
    )
    console.print(display.Display(runs, console=console)._table({runs[9].name}))
    head, *rows, caption, _ = console.file.getvalue().split("\n")
    assert head.split()[:3] == ["run", "status", "changes"]
    shown = [runs[seed].name for seed in (0, 3, 4, 5, 6, 9)]
    assert [row.split()[0] for row in rows] == shown
    assert caption.strip() == "1 failed, 6 finished, 4 new, 1 running"


def test_labels_leave_out_what_is_equal_and_fall_back_to_names(runs):
    def labels(*overrides):
        return display.labels([dataclasses.replace(runs[0], overrides=one) for one in overrides])

    assert labels({"seed": 1, "a.b": 2}, {"seed": 2, "a.b": 2}) == ["seed=1", "seed=2"]
    assert labels({"seed": 1}, {}) == ["seed=1", "base"]
    assert labels({"a": "x" * 60}, {}) == [runs[0].name] * 2
    assert labels({"seed": 1}) == [runs[0].name]


def test_short_names_of_fields(runs):
    overrides = {"a.b.width": 2, "c.b.width": 0.5, "seed": 1, "optimizer.learning_rate": 1e-3}
    run = plan.Run(runs[0].config, overrides, "0" * 16, runs[0].root)
    shown = display.describe(run, without=("seed",))
    assert shown == "a.b.width=2 c.b.width=0.5 learning_rate=0.001"
