"""The ladder config: its closed forms agree with the models that it makes."""

import json
import math
import pathlib
import subprocess

import pytest

from effarch import config_check
from effarch.configs import ladder
from effarch.models import accounting, build
from effarch.sweeping import estimates, plan, results


@pytest.mark.parametrize(("layers", "budget"), [("attention", 1e13), ("hybrid", 1e14)])
def test_a_rung_spends_its_budget(layers, budget):
    base = ladder.get_config(f"layers={layers}")
    overrides = ladder.rung(budget, 1, layers)
    c = config_check.finish(plan.apply(base, overrides))
    counts = accounting.count(build.abstract(c.model, vocab_size=ladder.VOCAB_SIZE), c.data.seq_len)
    size = ladder.params(c.model.width, c.model.depth, layers)
    assert counts.params_matmul == size
    spent = 6 * size * c.train.num_steps * c.data.batch_size * c.data.seq_len
    assert spent == pytest.approx(budget, rel=0.5 / c.train.num_steps + 1e-9)
    assert 0.7 < size / (0.1189 * budget**0.4969) < 1.5


def test_the_ladder_covers_sixteen_times_the_size_and_follows_the_laws():
    rungs = ladder.get_sweep("budgets=1e16+1e17,seeds=2")
    assert len(rungs) == 2 * 7 * 2
    assert [rung["seed"] for rung in rungs[:4]] == [0, 1, 0, 1]
    sizes = [ladder.params(r["model.width"], r["model.depth"], "attention") for r in rungs[:14:2]]
    assert sizes == sorted(sizes)
    assert sizes[-1] / sizes[0] == pytest.approx(16, rel=0.2)
    middle = rungs[6]
    scale = sizes[3] / 108e6
    assert middle["optimizer.learning_rate"] == pytest.approx(
        min(0.0047 * scale ** (-1 / 3), 2**-7)
    )
    assert middle["data.batch_size"] * 256 == pytest.approx(160 * 2048 * scale ** (2 / 3), rel=0.02)
    assert all(16 <= r["model.width"] / r["model.depth"] <= 64 for r in rungs)


def test_dry_run_shows_sizes_and_costs(tmp_path):
    base = ladder.get_config()
    base.model.vocab_size = ladder.VOCAB_SIZE  # no data is needed
    overrides = ladder.rung(1e13, 1, "attention")
    table = results.dry_run(plan.runs(base.lock(), [overrides], tmp_path)).splitlines()
    assert table[0].split() == [
        *("run", "status", "params", "tokens", "6ND", "FLOPs", "lr", "batch", "steps", "changes")
    ]
    cells = table[1].split()
    assert cells[1] == "new"
    six_nd, flops = float(cells[4]), float(cells[5])
    assert math.isclose(six_nd, 1e13, rel_tol=0.02)
    assert 1.05 < flops / six_nd < 1.5  # attention's scores
    assert f"width={overrides['model.width']}" in table[1]
    assert "learning_rate" not in table[1]
    assert table[2].startswith("1 runs, ")


def test_an_unknown_kind_of_layers_is_refused():
    with pytest.raises(ValueError, match="Did you mean 'hybrid'"):
        ladder.get_sweep("layers=hybird")


@pytest.mark.parametrize("budgets", ["abc", "1e13+", "-1e13", "0", "nan", "inf"])
def test_budgets_that_are_none_are_refused(budgets):
    with pytest.raises(ValueError, match="must be FLOPs above 0, such as"):
        ladder.get_sweep(f"budgets={budgets}")


def test_dry_run_estimates_times_once_a_step(tmp_path, monkeypatch):
    """Two seeds and two lengths of one model are one compile; a model that does not fit says so."""
    base = ladder.get_config()
    base.model.vocab_size = ladder.VOCAB_SIZE
    small, large = ({**ladder.rung(1e13, f, "attention"), "train.num_steps": 50} for f in (0.5, 1))
    sweep = [small, {**small, "seed": 1}, {**small, "train.num_steps": 200}, large]
    commands = []

    def run(command, **_):
        commands.append(command)
        (path,) = (part.removeprefix("--config=") for part in command if "--config=" in part)
        width = json.loads(pathlib.Path(path).read_text())["model"]["width"]
        fits = width == small["model.width"]
        return subprocess.CompletedProcess(command, 0 if fits else 1, '{"seconds": 1.5}', "")

    monkeypatch.setattr(estimates.subprocess, "run", run)
    runs = plan.runs(base.lock(), sweep, tmp_path)
    lines = results.dry_run(runs, target="v5e:1x1").splitlines()
    place = lines[0].index("time")
    times = [line[place : lines[0].index("changes")].strip() for line in lines[1:5]]
    assert times == ["1:15", "1:15", "5:00", "does not fit"]
    assert lines[5].endswith(", 7:30 on v5e:1x1 by the compiled steps")
    assert len(commands) == 2 and commands[0][-2:] == ["--target=v5e:1x1", "--json"]

    failed = subprocess.CompletedProcess([], 2, "", "note\nerror: --target=v9 is not known.\n")
    monkeypatch.setattr(estimates.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(ValueError, match=r"--target=v9, ladder.*: --target=v9 is not known"):
        results.dry_run(runs, target="v9")
