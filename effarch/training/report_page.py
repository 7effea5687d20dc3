"""One HTML page about one run, or comparing several; it needs no other file and no network."""

import datetime
import html
import json
import math
import os
import pathlib
from collections.abc import Callable, Sequence

import effarch
from effarch.training import (
    formatting,
    report_costs,
    report_figures,
    report_layers,
    report_load,
    report_rounding,
    report_runs,
)
from effarch.training.report_runs import Run
from effarch.training.report_style import CSS

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
_FINISHED = ("finished", "done", "complete", "completed")
# Summary keys with a row of their own; the table shows any other key by its name.
_COUNTS = {
    "params_total": "Parameters",
    "params_non_embedding": "Parameters without embeddings",
    "params_matmul": "Parameters in matmuls",
    "params_active": "Parameters active for a token",
    "tokens": "Tokens",
}
_FORWARD = {
    "flops_forward": "Forward FLOPs a token",
    "flops_forward_no_head": "Forward FLOPs a token, without the head",
    "flops_active": "Forward FLOPs in use a token",
    "flops_active_no_head": "Forward FLOPs in use a token, without the head",
}
_KNOWN = {
    *_COUNTS,
    *_FORWARD,
    *(
        "flops_model",
        "flops_hw",
        "flops_6nd",
        "steps",
        "step_seconds",
        "device",
        "seconds",
        "compile_seconds",
        "skipped_steps",
        "resumes",
        "status",
        "optimizer_state_bytes",
    ),
    *("gzip_bits_per_byte", "xz_bits_per_byte", "tokens_per_second", "mfu", "hfu"),
}


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
            _section("Result", _verdict(runs)),
            _section("Kernels", _kernels(runs)),
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
        f"<title>{_text(title)}</title><style>{CSS}</style></head>\n<body><main>{body}"
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
    below = "".join(f'<p class="note">{_text(note)}</p>' for note in notes)
    if len(runs) == 1:
        run = runs[0]
        lead = f"{_badge(run)} {_text(_progress(run))}"
        title, below = _text(run.name), below + _cards(run)
    else:
        title, lead = f"{len(runs)} runs compared", _text(_comparison(runs))
    return f'<header><h1>{title}</h1><p class="lead">{lead}</p>{below}</header>'


def _badge(run: Run) -> str:
    status = str(run.summary.get("status") or "unfinished")
    return f'<span class="badge{" good" if status in _FINISHED else ""}">{_text(status)}</span>'


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


def _verdict(runs: Sequence[Run]) -> str:
    rows = [
        *_validation_rows(runs),
        *_size_rows(runs),
        *_cost_rows(runs),
        *_other_rows(runs),
    ]
    rows = [row for row in rows if any(row[1])]
    return _table(runs, rows) if rows else "<p>No records yet.</p>"


# A row is (label, one HTML cell a run).
Row = tuple[str, list[str]]


def _validation_rows(runs: Sequence[Run]) -> list[Row]:
    names = [("Validation loss, nats per token", "loss"), ("Bits per byte", "bits_per_byte")]
    sources = dict.fromkeys(source for run in runs for source in run.sources)
    names += [(f"Bits per byte, {source}", f"{source}/bits_per_byte") for source in sources]
    rows = []
    for label, name in names:
        finals = [run.final(name) for run in runs]
        lowest = min((v for v in finals if v is not None and math.isfinite(v)), default=None)
        marks = ["*" if len(runs) > 1 and v is not None and v == lowest else "" for v in finals]
        cells = [_final_cell(run.best(name), final) for run, final in zip(runs, finals)]
        rows.append((label, [mark + cell for mark, cell in zip(marks, cells)]))
    for name in dict.fromkeys(name for run in runs for name in run.shares):
        finals = [run.final(name) for run in runs]
        highest = max((v for v in finals if v is not None), default=None)
        marks = ["*" if len(runs) > 1 and v == highest else "" for v in finals]
        cells = [mark + _cell(v, "{:.1%}".format) for mark, v in zip(marks, finals)]
        *part, share = name.split("/")
        label = ", ".join([share.replace("_", " ").capitalize(), *part])
        rows.append((label, cells))
    for name in ("gzip", "xz"):
        bits = [run.figure(f"{name}_bits_per_byte") for run in runs]
        rows.append((f"Bits per byte of {name}", [_cell(value, "{:.4f}".format) for value in bits]))
    return rows


def _final_cell(best: tuple[float, int] | None, final: float | None) -> str:
    """The last value and, if it was lower before, the lowest and its step."""
    if final is None:
        return ""
    is_last = best is None or f"{best[0]:.4f}" == f"{final:.4f}"
    return f"{final:.4f}" + (
        "" if is_last else f" <small>best {best[0]:.4f} at step {best[1]:,}</small>"
    )


def _size_rows(runs: Sequence[Run]) -> list[Row]:
    rows = [
        (label, [_cell(run.figure(name), _exact_count) for run in runs])
        for name, label in _COUNTS.items()
    ]
    steps = [
        f"{run.last_step:,}" + (f" of {run.total_steps:,}" if run.total_steps else "")
        for run in runs
    ]
    return [*rows, ("Steps", steps)]


def _cost_rows(runs: Sequence[Run]) -> list[Row]:
    def row(label: str, read: Callable[[Run], float | None], show: Callable[[float], str]) -> Row:
        return label, [_cell(read(run), show) for run in runs]

    return [
        row("Model FLOPs", lambda run: run.figure("flops_model"), formatting.scientific),
        row("Hardware FLOPs", lambda run: run.figure("flops_hw"), formatting.scientific),
        row("FLOPs by 6ND", lambda run: run.figure("flops_6nd"), formatting.scientific),
        *[
            row(label, lambda run, name=name: run.figure(name), formatting.count)
            for name, label in _FORWARD.items()
        ],
        row("Time for a step", lambda run: run.typical("step_seconds"), "{:.4g} s".format),
        row("Tokens per second", lambda run: run.typical("tokens_per_second"), formatting.count),
        row("Model FLOP utilization", lambda run: run.typical("mfu"), "{:.1%}".format),
        row("Hardware FLOP utilization", lambda run: run.typical("hfu"), "{:.1%}".format),
        row(
            "Optimizer state",
            lambda run: run.figure("optimizer_state_bytes"),
            lambda size: f"{formatting.count(size)}B",
        ),
        row("Wall-clock", lambda run: run.figure("seconds"), formatting.duration),
        row("Compilation", lambda run: run.figure("compile_seconds"), formatting.duration),
        ("Device", [_text(run.summary.get("device") or "") for run in runs]),
    ]


def _other_rows(runs: Sequence[Run]) -> list[Row]:
    rows = [
        ("Status", [_badge(run) for run in runs]),
        ("Skipped steps", [_cell(run.figure("skipped_steps"), "{:,.0f}".format) for run in runs]),
        ("Losses not finite", [_not_finite(run) for run in runs]),
        ("Resumed", [_cell(run.figure("resumes"), "{:,.0f} times".format) for run in runs]),
        ("Config fingerprint", [_text(run.fingerprint) for run in runs]),
    ]
    names = dict.fromkeys(name for run in runs for name in run.summary)
    for name in names:
        if name not in _KNOWN and not name.startswith(("val/", report_runs.BACKEND)):
            cells = [_text(formatting.value(run.summary.get(name))) for run in runs]
            rows.append((name, cells))
    return rows


def _kernels(runs: Sequence[Run]) -> str:
    """Which backend each operation of the training step ran on."""
    keys = dict.fromkeys(
        k for run in runs for k in run.summary if k.startswith(report_runs.BACKEND)
    )
    rows = [
        (key.removeprefix(report_runs.BACKEND), [_text(run.summary.get(key, "")) for run in runs])
        for key in keys
    ]
    return _table(runs, rows) if rows else ""


def _not_finite(run: Run) -> str:
    steps, values = report_runs.series(run.train, "loss")
    bad = [int(step) for step, value in zip(steps, values) if not math.isfinite(value)]
    return f"{len(bad):,} <small>first at step {bad[0]:,}</small>" if bad else ""


def _table(runs: Sequence[Run], rows: Sequence[Row], style: str = "") -> str:
    """Rows down, runs across; one run needs no head. A cell that begins with * is the best."""
    head = ""
    if len(runs) > 1:
        names = "".join(f"<th>{_key(i)}{_text(run.name)}</th>" for i, run in enumerate(runs))
        head = f"<thead><tr><th></th>{names}</tr></thead>"
    body = "".join(
        f"<tr><th>{_text(label)}</th>"
        + "".join(
            f'<td class="best">{cell[1:]}</td>' if cell[:1] == "*" else f"<td>{cell}</td>"
            for cell in cells
        )
        + "</tr>"
        for label, cells in rows
    )
    style = f"{style} {'one' if len(runs) == 1 else 'several'}".strip()
    return f'<div class="scroll"><table class="{style}">{head}<tbody>{body}</tbody></table></div>'


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
        parts += [f"<h3>{_text(run.name)}</h3>"] if len(runs) > 1 and found else []
        parts += [f'<div class="grid">{"".join(found)}</div>'] if found else []
    return "".join(parts)


def _samples(runs: Sequence[Run]) -> str:
    parts = []
    for run in runs:
        parts += [f"<h3>{_text(run.name)}</h3>"] if len(runs) > 1 and run.samples else []
        for number, (name, text) in enumerate(run.samples):
            state = " open" if number == 0 else ""
            parts.append(_details(name, text, state))
    return "".join(parts)


def _difference(runs: Sequence[Run]) -> str:
    """The config fields in which several runs differ."""
    if len(runs) < 2 or not all(run.config for run in runs):
        return ""
    rows = [
        (name, [_text(_json(value)) for value in values])
        for name, values in report_runs.differing(runs).items()
    ]
    return _table(runs, rows, "fields") if rows else "<p>The configs are equal.</p>"


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
    return f"<details{state}><summary>{_text(label)}</summary><pre>{_text(text)}</pre></details>"


def _key(index: int) -> str:
    return f'<i class="key" style="border-top: 3px solid {report_figures.colour(index)}"></i>'


def _cell(value: float | None, show: Callable[[float], str]) -> str:
    return "" if value is None else _text(show(value))


def _exact_count(number: float) -> str:
    """1.23M (1,234,567)."""
    short = formatting.count(number)
    return short if short == f"{number:,.0f}" else f"{short} ({number:,.0f})"


def _json(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _text(text: object) -> str:
    return html.escape(str(text), quote=True)
