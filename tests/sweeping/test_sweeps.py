"""The combinators, and what a config file's sweep becomes."""

import pytest

from effarch import config, config_check, sweeps
from effarch.configs import tasks
from effarch.sweeping import plan, results, schedule
from effarch.training import run_folder


def test_product_varies_the_last_part_fastest():
    assert sweeps.product({"a": [1, 2]}, {"b": ["xy", "z"], "c": [0]}) == [
        {"a": 1, "b": "xy", "c": 0},
        {"a": 1, "b": "z", "c": 0},
        {"a": 2, "b": "xy", "c": 0},
        {"a": 2, "b": "z", "c": 0},
    ]


def test_together_and_chain():
    pairs = sweeps.together({"lr": [1, 2], "width": [8, 16]})
    assert pairs == [{"lr": 1, "width": 8}, {"lr": 2, "width": 16}]
    assert sweeps.chain(pairs, {"lr": [3]}) == [*pairs, {"lr": 3}]
    assert len(sweeps.product({"m": ["a", "b"]}, pairs, {"seed": range(3)})) == 12


def test_parts_are_not_changed_or_shared():
    part = [{"a": 1}]
    sweeps.product(part, {"b": [1]})[0]["a"] = 5
    sweeps.chain(part)[0]["a"] = 5
    assert part == [{"a": 1}]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: sweeps.product({"a": [1]}, {"a": [2]}), "a is set by two parts"),
        (lambda: sweeps.together({"a": [1], "b": [1, 2]}), "equally many values"),
        (lambda: sweeps.product({"a": "xyz"}), r"a='xyz' must be a list"),
        (lambda: sweeps.chain({"a": 3}), r"write \[3\]"),
        (lambda: sweeps.lengths([1000, 501, 250]), r"would save every 1 steps.*401, 200"),
    ],
)
def test_mistakes_in_a_sweep(call, words):
    with pytest.raises(ValueError, match=words):
        call()


@pytest.fixture(scope="module")
def base():
    return config.default().lock()


def test_runs_are_known_by_the_fingerprint_of_their_config(base, tmp_path):
    sweep = [{"seed": 1}, {"seed": 2}, {"seed": 1, "log.every_steps": 5}, {}]
    runs = plan.runs(base, sweep, tmp_path)
    assert [run.config.seed for run in runs] == [1, 2, 0]  # logging does not make another run
    assert runs[0].folder == tmp_path / f"run-{runs[0].fingerprint[:8]}"
    assert len({run.fingerprint for run in runs}) == 3
    again = plan.runs(base, [{"seed": 2}], tmp_path)
    assert again[0].fingerprint == runs[1].fingerprint
    assert base.seed == 0


def test_values_take_the_type_of_their_field(base, tmp_path):
    import numpy as np

    sweep = [
        {"optimizer.learning_rate": np.float64(0.5), "data.sources": ["files:a", "files:b"]},
        {"optimizer.learning_rate": 1, "seed": np.int64(3)},
    ]
    first, second = plan.runs(base, sweep, tmp_path)
    assert first.config.optimizer.learning_rate == 0.5
    assert first.config.data.sources == ("files:a", "files:b")
    assert isinstance(second.config.optimizer.learning_rate, float)
    assert second.config.seed == 3


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"model.wdith": 3}, r"model\.wdith is not a config field.*Did you mean 'width'"),
        ({"model.width.x": 3}, r"model\.width\.x is not a config field"),
        ({"seed": "one"}, "seed='one' has the wrong type"),
        ({"model.width": 0}, r"model\.width=0 must be above 0"),
        ({"model": {"width": 1}}, r"model is a section; set its fields, as model\.NAME"),
        ({"train.num_steps": 5}, r"--config\.train\.num_steps is also set"),
    ],
)
def test_wrong_overrides_are_refused(base, tmp_path, overrides, words):
    with pytest.raises(ValueError, match=words):
        plan.runs(base, [overrides], tmp_path, taken=["train.num_steps"])


def test_a_sweep_is_read_from_the_file_of_its_config(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("def get_sweep(arg=''):\n    return [{'seed': int(arg)}]\n")
    assert plan.get_sweep(str(path), "7") == [{"seed": 7}]
    path.write_text("def get_sweep():\n    return ({'seed': n} for n in (1, 2))\n")
    assert plan.get_sweep(str(path), "") == [{"seed": 1}, {"seed": 2}]
    for mistake in ("{'seed': [1, 2]}", "None", "['seed']"):
        path.write_text(f"def get_sweep():\n    return {mistake}\n")
        with pytest.raises(ValueError, match=r"must return a list of dicts of overrides, .*, not "):
            plan.get_sweep(str(path), "")
    path.write_text("")
    with pytest.raises(ValueError, match=r"mine\.py has no get_sweep"):
        plan.get_sweep(str(path), "")


def test_a_saved_config_is_a_config_file(base, tmp_path):
    from effarch import saved_config

    path = tmp_path / "config.json"
    path.write_text(config.to_json(base))
    assert config.fingerprint(saved_config.get_config(str(path))) == config.fingerprint(base)
    path.write_text("[1]")
    with pytest.raises(ValueError, match="does not hold a config"):
        saved_config.get_config(str(path))


def test_runs_of_several_lengths_share_the_longest_as_their_trunk(base, tmp_path):
    sweep = sweeps.product({"seed": [1, 2]}, sweeps.lengths([500, 1000, 2000]))
    assert [run["train.num_steps"] for run in sweep[:3]] == [2000, 1000, 500]
    assert {run["checkpoint.keep_period"] for run in sweep} == {400}  # of the decays at 400 and 800
    runs = plan.runs(base, sweep, tmp_path)
    by_name = {run.name: (run.config.seed, run.config.train.num_steps) for run in runs}
    trunks = [run.trunk and by_name[run.trunk.name] for run in runs]
    assert trunks == [None, (1, 2000), (1, 2000), None, (2, 2000), (2, 2000)]
    whole = {"train.num_steps": 500, "optimizer.schedule.kind": "wsd", "seed": 1}
    alone = plan.runs(base, [whole | {"optimizer.schedule.decay_fraction": 0.2}], tmp_path)[0]
    assert alone.trunk is None and alone.fingerprint == runs[2].fingerprint  # one and the same run


def test_a_run_waits_for_its_trunk(base, tmp_path, monkeypatch):
    runs = plan.runs(base, sweeps.lengths([10, 20]), tmp_path)
    started = []

    class Done:
        id = None

        def poll(self):
            return 0

    class Launcher:
        capacity = 2

        def start(self, name, command, log):
            started.append((name, [part for part in command if part.startswith("--trunk")]))
            return Done()

    monkeypatch.setattr(schedule.status, "finished", lambda run: run.name in dict(started))
    assert schedule.Sweep(runs, Launcher(), poll_seconds=0).run() == 0
    assert started == [(runs[0].name, []), (runs[1].name, [f"--trunk={runs[0].folder}"])]


def test_whole_configs_as_runs(tmp_path):
    base = tasks.get_config("task=mqar")
    sweep = tasks.get_sweep("task=mqar,tasks=mqar+copying,mixers=gla+gated_delta_net")
    assert sweep[1] == {}  # the base itself
    runs = plan.runs(base.lock(), sweep, tmp_path)
    for run, arg in zip(runs, ("mqar,mixer=gla", "mqar", "copying,mixer=gla", "copying")):
        whole = config_check.finish(tasks.get_config(f"task={arg}"))
        assert run.fingerprint == config.fingerprint(whole)
        assert run.config.name == whole.name


def test_the_table_has_a_line_a_run_and_every_figure(base, tmp_path):
    runs = plan.runs(base, [{"seed": 1}, {"seed": 2}], tmp_path)
    run_folder.create(runs[0].folder, runs[0].config, data=None)
    summary = {"status": "finished", "seconds": 75, "val/loss": 1.5, "val/accuracy": 0.25}
    run_folder.write_json(runs[0].folder / run_folder.SUMMARY, summary)
    header, first, second = (line.split() for line in results.table(runs).splitlines())
    assert header == ["run", "status", "time", "loss", "accuracy", "changes"]
    assert first == [runs[0].name, "finished", "1:15", "1.5000", "0.2500", "seed=1"]
    assert second == [runs[1].name, "new", "seed=2"]
