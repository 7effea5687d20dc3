"""What layers report in each step, drawn: sparsity, routing, rounding, and metrics of one's own."""

from effarch.training import (
    report_figures,
    report_layers,
    report_page,
    report_rounding,
    report_runs,
    writers,
)


def run(folder, rounding=None, **metrics):
    """Three steps that report each metric as it is, then twice and three times as large."""
    with writers.MetricsWriter(folder, tensorboard=False) as writer:
        for step in (1, 2, 3):
            reported = {name.replace("__", "/"): value * step for name, value in metrics.items()}
            writer.write(step, {"loss": 3.0, **reported})
        if rounding is not None:
            writer.write(3, {"layers/0/ffn/up/x_error": rounding}, kind="rounding")
    return folder


def test_each_metric_has_a_panel_of_the_runs_that_report_it(tmp_path):
    dense = run(tmp_path / "dense")
    sparse = run(tmp_path / "sparse", metric__active_fraction=0.25, metric__dropped=0.0)
    routed = run(
        tmp_path / "routed",
        loss__router_balance=0.5,
        metric__my_own=2.0,
        metric__max_vio=1.0,
        metric__max_vio_max=1.5,
    )
    found = report_layers.panels(report_runs.read_runs([dense, sparse, routed]))
    assert [panel.title for panel in found] == [
        *("Active neurons", "Load of the fullest expert", "Balancing loss", "My own")
    ]
    assert [panel.unit for panel in found[-2:]] == ["nats, added to the loss", "my own"]
    (curve,) = found[0].curves
    assert (curve.label, curve.values.tolist()) == ("sparse", [0.25, 0.5, 0.75])
    assert curve.colour == report_figures.colour(1)
    assert found[3].curves[0].colour == report_figures.colour(2)
    assert not report_layers.panels(report_runs.read_runs([dense]))


def test_a_lone_curve_among_several_runs_has_its_name_and_its_colour(tmp_path):
    folders = [run(tmp_path / "plain"), run(tmp_path / "rounded", rounding=0.125)]
    runs = report_runs.read_runs(folders)
    (panel,) = report_rounding.panels(runs)
    (curve,) = panel.curves
    assert (curve.label, curve.colour) == ("rounded", report_figures.colour(1))
    (panel,) = report_rounding.panels(runs[1:])
    assert (panel.curves[0].label, panel.curves[0].colour) == ("layer 0", report_figures.colour(0))
    page = report_page.write_report(folders, tmp_path / "page.html").read_text()
    legend = page.partition("Rounding error of activations</h3>")[2].partition("</div>")[0]
    assert "rounded" in legend and report_figures.colour(1) in legend
    alone = report_page.write_report(folders[1:], tmp_path / "page.html").read_text()
    assert '<div class="legend"></div>' in alone.partition("Rounding error of activations</h3>")[2]
