"""Tables of a report: what runs reached, what they are and cost, and which kernels they used."""

import html
import math
from collections.abc import Callable, Sequence

from effarch.training import formatting, report_figures, report_runs
from effarch.training.report_runs import Run

Row = tuple[str, list[str]]
"""A label, and one HTML cell a run."""
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


def result(runs: Sequence[Run]) -> str:
    """All figures of the runs; the best of several are marked."""
    rows = [
        *_validation_rows(runs),
        *_size_rows(runs),
        *_cost_rows(runs),
        *_other_rows(runs),
    ]
    rows = [row for row in rows if any(row[1])]
    return table(runs, rows) if rows else "<p>No records yet.</p>"


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
        ("Device", [escaped(run.summary.get("device") or "") for run in runs]),
    ]


def _other_rows(runs: Sequence[Run]) -> list[Row]:
    rows = [
        ("Status", [badge(run) for run in runs]),
        ("Skipped steps", [_cell(run.figure("skipped_steps"), "{:,.0f}".format) for run in runs]),
        ("Losses not finite", [_not_finite(run) for run in runs]),
        ("Resumed", [_cell(run.figure("resumes"), "{:,.0f} times".format) for run in runs]),
        ("Config fingerprint", [escaped(run.fingerprint) for run in runs]),
    ]
    names = dict.fromkeys(name for run in runs for name in run.summary)
    for name in names:
        if name not in _KNOWN and not name.startswith(("val/", report_runs.BACKEND)):
            cells = [escaped(formatting.value(run.summary.get(name))) for run in runs]
            rows.append((name, cells))
    return rows


def kernels(runs: Sequence[Run]) -> str:
    """Which backend each operation of the training step ran on."""
    keys = dict.fromkeys(
        k for run in runs for k in run.summary if k.startswith(report_runs.BACKEND)
    )
    rows = [
        (key.removeprefix(report_runs.BACKEND), [escaped(run.summary.get(key, "")) for run in runs])
        for key in keys
    ]
    return table(runs, rows) if rows else ""


def _not_finite(run: Run) -> str:
    steps, values = report_runs.series(run.train, "loss")
    bad = [int(step) for step, value in zip(steps, values) if not math.isfinite(value)]
    return f"{len(bad):,} <small>first at step {bad[0]:,}</small>" if bad else ""


def table(runs: Sequence[Run], rows: Sequence[Row], style: str = "") -> str:
    """Rows down, runs across; one run needs no head. A cell that begins with * is the best."""
    head = ""
    if len(runs) > 1:
        names = "".join(f"<th>{_key(i)}{escaped(run.name)}</th>" for i, run in enumerate(runs))
        head = f"<thead><tr><th></th>{names}</tr></thead>"
    body = "".join(
        f"<tr><th>{escaped(label)}</th>"
        + "".join(
            f'<td class="best">{cell[1:]}</td>' if cell[:1] == "*" else f"<td>{cell}</td>"
            for cell in cells
        )
        + "</tr>"
        for label, cells in rows
    )
    style = f"{style} {'one' if len(runs) == 1 else 'several'}".strip()
    return f'<div class="scroll"><table class="{style}">{head}<tbody>{body}</tbody></table></div>'


def badge(run: Run) -> str:
    """Whether the run is finished."""
    status = str(run.summary.get("status") or "unfinished")
    return f'<span class="badge{" good" if status in _FINISHED else ""}">{escaped(status)}</span>'


def _key(index: int) -> str:
    return f'<i class="key" style="border-top: 3px solid {report_figures.colour(index)}"></i>'


def _cell(value: float | None, show: Callable[[float], str]) -> str:
    return "" if value is None else escaped(show(value))


def _exact_count(number: float) -> str:
    """1.23M (1,234,567)."""
    short = formatting.count(number)
    return short if short == f"{number:,.0f}" else f"{short} ({number:,.0f})"


def escaped(value: object) -> str:
    """As HTML shows it."""
    return html.escape(str(value))
