"""One HTML page about one run, or comparing several; it needs no other file and no network."""

import datetime
import json
import math
import os
import pathlib
from collections.abc import Sequence

import effarch
from effarch.training import (
    formatting,
    report_costs,
    report_figures,
    report_layers,
    report_load,
    report_rounding,
    report_runs,
    report_tables,
)
from effarch.training.report_runs import Run
from effarch.training.report_style import CSS
from effarch.training.report_tables import badge, escaped

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def write_report(
    folders: Sequence[str | os.PathLike],
    out: str | os.PathLike,
    *,
    names: Sequence[str] | None = None,
) -> pathlib.Path:
    """Writes the page about the runs in `folders` to the file `out` and returns its path.

    `names`: what the page calls them, by default their folders.
    """
    runs = report_runs.read_runs(folders, names)
    title = (
        runs[0].name if len(runs) == 1 else f"{len(runs)} runs: {', '.join(r.name for r in runs)}"
    )
    body = "".join(
        (
            _head(runs),
            _section("What differs", _difference(runs)),
            _section("Result", report_tables.result(runs)),
            _section("Kernels", report_tables.kernels(runs)),
            _section("Curves", _curves(runs)),
            _section("Experts", _experts(runs)),
            _section("Inside the model", _inside(runs)),
            _section("Text samples", _samples(runs)),
            _section("Configuration", _configuration(runs)),
        )
    )
    now = datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")
    page = (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        f"<title>{escaped(title)}</title><style>{CSS}</style></head>\n<body><main>{body}"
        f"<footer>effarch {effarch.__version__}, {now}</footer></main></body></html>\n"
    )
    out = pathlib.Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(page, encoding="utf-8")
    return out


def _head(runs: Sequence[Run]) -> str:
    """The title, a sentence or the state of each run, and for one run its figures as cards."""
    notes = [
        note if len(runs) == 1 else f"{run.name}: {note}" for run in runs for note in run.notes
    ]
    below = "".join(f'<p class="note">{escaped(note)}</p>' for note in notes)
    if len(runs) == 1:
        run = runs[0]
        lead = f"{badge(run)} {escaped(_progress(run))}"
        title, below = escaped(run.name), below + _cards(run)
    else:
        title, lead = f"{len(runs)} runs compared", escaped(_comparison(runs))
    return f'<header><h1>{title}</h1><p class="lead">{lead}</p>{below}</header>'


def _progress(run: Run) -> str:
    of = f" of {run.total_steps:,}" if run.total_steps else ""
    device = run.summary.get("device")
    return f"step {run.last_step:,}{of}" + (f" on {device}" if device else "")


def _comparison(runs: Sequence[Run]) -> str:
    """Which run has the lowest validation figure, and by how much."""
    for name, unit in (("bits_per_byte", "bits per byte"), ("loss", "nats per token")):
        finals = [(run.final(name), run.name) for run in runs]
        known = sorted((v, n) for v, n in finals if v is not None and math.isfinite(v))
        if len(known) > 1:
            (low, first), (second, other) = known[:2]
            return (
                f"Lowest in validation: {first} with {low:.4f} {unit}, "
                f"{second - low:.4f} below {other}."
            )
    return "No validation figures to compare yet."


def _cards(run: Run) -> str:
    loss, bits = run.final("loss"), run.final("bits_per_byte")
    speed, seconds, tokens = (
        run.typical("tokens_per_second"),
        run.figure("seconds"),
        run.figure("tokens"),
    )
    cards = [
        ("validation bits per byte", bits, "{:.4f}".format),
        ("validation loss, nats per token", loss, "{:.4f}".format),
        ("accuracy", run.final("accuracy"), "{:.1%}".format),
        ("tokens", tokens, formatting.count),
        ("tokens per second", speed, formatting.count),
        ("model FLOP utilization", run.typical("mfu"), "{:.1%}".format),
        ("wall-clock", seconds, formatting.duration),
    ]
    known = [(label, show(value)) for label, value, show in cards if value is not None]
    inner = "".join(
        f'<div class="card"><b>{text}</b><span>{label}</span></div>' for label, text in known
    )
    return f'<div class="cards">{inner}</div>' if known else ""


def _curves(runs: Sequence[Run]) -> str:
    figures = [
        report_figures.figure(panel, f"figure{number}", is_named=len(runs) > 1)
        for number, panel in enumerate(
            [
                *report_figures.panels(runs),
                *report_costs.panels(runs),
                *report_layers.panels(runs),
                *report_rounding.panels(runs),
            ]
        )
    ]
    return f'<div class="grid">{"".join(figures)}</div>' if figures else "<p>No records yet.</p>"


def _experts(runs: Sequence[Run]) -> str:
    figures = [
        report_load.figure(run, f"load{number}", run.name if len(runs) > 1 else "")
        for number, run in enumerate(runs)
        if run.expert_load
    ]
    return f'<div class="grid">{"".join(figures)}</div>' if figures else ""


def _inside(runs: Sequence[Run]) -> str:
    """The figures that `effarch.analysis` left in the folder."""
    parts = []
    for index, run in enumerate(runs):
        found = [
            report_figures.figure(panel, f"inside{index}-{number}")
            for number, panel in enumerate(report_figures.of_analyses(run.analyses))
        ]
        parts += [f"<h3>{escaped(run.name)}</h3>"] if len(runs) > 1 and found else []
        parts += [f'<div class="grid">{"".join(found)}</div>'] if found else []
    return "".join(parts)


def _samples(runs: Sequence[Run]) -> str:
    parts = []
    for run in runs:
        parts += [f"<h3>{escaped(run.name)}</h3>"] if len(runs) > 1 and run.samples else []
        for number, (name, text) in enumerate(run.samples):
            state = " open" if number == 0 else ""
            parts.append(_details(name, text, state))
    return "".join(parts)


def _difference(runs: Sequence[Run]) -> str:
    """The config fields in which several runs differ."""
    if len(runs) < 2 or not all(run.config for run in runs):
        return ""
    rows = [
        (name, [escaped(_json(value)) for value in values])
        for name, values in report_runs.differing(runs).items()
    ]
    return report_tables.table(runs, rows, "fields") if rows else "<p>The configs are equal.</p>"


def _configuration(runs: Sequence[Run]) -> str:
    parts = []
    for run in runs:
        if run.config:
            label = "The whole config" if len(runs) == 1 else f"The whole config of {run.name}"
            parts.append(_details(label, json.dumps(run.config, indent=2, ensure_ascii=False), ""))
    return "".join(parts)


def _section(title: str, content: str) -> str:
    return f"<section><h2>{title}</h2>{content}</section>\n" if content else ""


def _details(label: str, text: str, state: str) -> str:
    return (
        f"<details{state}><summary>{escaped(label)}</summary><pre>{escaped(text)}</pre></details>"
    )


def _json(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
