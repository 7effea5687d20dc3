"""Runs compared at equal cost: each point of a curve lies at what the run had cost by then."""

import json

import pytest

from effarch.training import report_costs, report_runs, writers


def run(folder, tokens, seconds, flops, evals=(10, 20, 30, 40)):
    """Forty steps whose loss is their number, recorded every fifth; each costs the same."""
    with writers.MetricsWriter(folder, tensorboard=False) as writer:
        for step in range(5, 41, 5):
            clock = {"time/step_seconds": seconds}
            writer.write(step, {"loss": float(step), "tokens": tokens * step, **clock})
            if step in evals:
                writer.write(step, {"loss": step + 0.5}, kind="eval")
    summary = {"steps": 40, "flops_model": 40 * flops} if flops else {}
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def drawn(*folders):
    return {panel.across: panel for panel in report_costs.panels(report_runs.read_runs(folders))}


def test_points_lie_at_the_cost_of_their_step(tmp_path):
    runs = run(tmp_path / "a", 64, 0.5, 1e9), run(tmp_path / "b", 128, 0.25, 3e9)
    found = drawn(*runs)
    assert list(found) == ["tokens", "model FLOPs", "seconds of training steps"]
    for panel, (a, b) in zip(found.values(), ((64, 128), (1e9, 3e9), (0.5, 0.25))):
        assert panel.title.startswith("Validation loss at equal ")
        assert [curve.label for curve in panel.curves] == ["a", "b"]
        for curve, cost in zip(panel.curves, (a, b)):
            assert curve.steps == pytest.approx([10 * cost, 20 * cost, 30 * cost, 40 * cost])
            assert curve.values.tolist() == [10.5, 20.5, 30.5, 40.5]


def test_costs_that_are_alike_or_unknown_are_left_out(tmp_path):
    first = run(tmp_path / "a", 64, 0.5, 1e9)
    assert list(drawn(first, run(tmp_path / "b", 64, 0.5, 2e9))) == ["model FLOPs"]
    assert list(drawn(first, run(tmp_path / "c", 64, 0.7, None))) == ["seconds of training steps"]
    assert not drawn(first)


def test_a_run_that_goes_on_is_compared_by_the_flops_of_its_records(tmp_path):
    half = tmp_path / "half"
    with writers.MetricsWriter(half, tensorboard=False) as writer:
        for step in (1, 10, 20):
            writer.write(step, {"loss": 1.0, "tokens": 64 * step, "flops_model": 3e9 * step})
        for step in (5, 10, 20):
            writer.write(step, {"loss": 1.0}, kind="eval")
    panel = drawn(run(tmp_path / "a", 64, 0.5, 1e9), half)["model FLOPs"]
    assert panel.curves[1].steps == pytest.approx([15e9, 30e9, 60e9])


def test_training_losses_stand_in_where_there_are_few_validations(tmp_path):
    runs = run(tmp_path / "a", 64, 0.5, 1e9), run(tmp_path / "b", 128, 0.5, 1e9, evals=(40,))
    (panel,) = drawn(*runs).values()
    assert panel.title == "Training loss at equal tokens"
    assert panel.curves[1].steps.tolist() == [128.0 * step for step in range(5, 41, 5)]
