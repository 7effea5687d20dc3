"""What a sweep found: a CSV file with a line for each run, and one page that compares them."""

import csv
import functools
import json
import pathlib
from collections.abc import Sequence
from typing import Any

from effarch import config as config_lib
from effarch.data import batches, dataset
from effarch.models import accounting, build
from effarch.sweeping import display, estimates, status
from effarch.sweeping.plan import Run
from effarch.training import evaluation, formatting, report_page

CSV, PAGE = "results.csv", "report.html"
_COLUMNS = ("optimizer.learning_rate", "data.batch_size", "train.num_steps")
"""Fields that have a column of their own in the dry run."""


def write(runs: Sequence[Run], root: pathlib.Path) -> list[pathlib.Path]:
    """Writes results.csv, and report.html if a run is finished; returns their paths."""
    rows = [_row(run) for run in runs]
    columns = list(dict.fromkeys(name for row in rows for name in row))
    root.mkdir(parents=True, exist_ok=True)
    with (root / CSV).open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="")
        writer.writeheader()
        writer.writerows(rows)
    written = [root / CSV]
    finished = [run for run in runs if status.finished(run)]
    if finished:
        folders = [run.folder for run in finished]
        names = display.labels(finished)
        written.append(report_page.write_report(folders, root / PAGE, names=names))
    return written


def _row(run: Run) -> dict[str, Any]:
    """Name, state, what the sweep set and the summary's figures."""
    state = status.of(run)
    summary = {name: v for name, v in status.summary(run).items() if name != "status"}
    identity = {"run": run.name, "fingerprint": run.fingerprint, "status": state}
    return identity | run.overrides | (summary if state == status.FINISHED else {})


def dry_run(runs: Sequence[Run], *, target: str | None = None) -> str:
    """A table of what the sweep would do: sizes, FLOPs, tokens, learning rate and batch of each run.

    FLOPs are the model's own count; 6ND counts the matrices that a token meets, with the head. `target`
    adds the time that the runs would take on such a machine (estimates.py).

    Builds no array; prepares the data if the vocabulary's size depends on it.
    """
    header = ["run", "status", "params", "tokens", "6ND", "FLOPs", "lr", "batch", "steps"]
    rows = [_planned(run) for run in runs]
    cells, total = [row for row, _ in rows], sum(flops for _, flops in rows)
    in_all = f"{len(runs)} runs, {formatting.scientific(total)} FLOPs in all"
    if target:
        seconds = estimates.seconds(runs, target)
        header.append("time")
        for row, time in zip(cells, seconds):
            row.append("does not fit" if time is None else formatting.duration(time))
        whole = formatting.duration(sum(filter(None, seconds)))
        in_all += f", {whole} on {target} by the compiled steps"
    changes = [display.describe(run, without=_COLUMNS) for run in runs]
    lines = [[*header, "changes"], *([*row, change] for row, change in zip(cells, changes))]
    return f"{_aligned(lines)}\n{in_all}"


def table(runs: Sequence[Run]) -> str:
    """What the runs reached, a line each: state, time, every figure of the last validation, and what
    the sweep set or, of a failed run, what it said last."""
    summaries = {run.name: status.summary(run) if status.finished(run) else {} for run in runs}
    figures = [
        f"val/{name}"
        for name in ("loss", *evaluation.METRICS)
        if any(f"val/{name}" in summary for summary in summaries.values())
    ]
    names = [name.removeprefix("val/").replace("_", " ") for name in figures]
    lines = [["run", "status", "time", *names, "changes"]]
    for run in runs:
        summary = summaries[run.name]
        state = status.of(run)
        seconds = formatting.duration(summary["seconds"]) if summary else ""
        values = [display.figure(summary[name]) if name in summary else "" for name in figures]
        lines.append([run.name, state, seconds, *values, display.outcome(run, state)])
    return _aligned(lines)


def _aligned(lines: Sequence[Sequence[str]]) -> str:
    """Cells below each other; the last column keeps its width."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]) - 1)]
    return "\n".join(
        "  ".join([*(cell.ljust(width) for cell, width in zip(line, widths)), line[-1]]).rstrip()
        for line in lines
    )


def _planned(run: Run) -> tuple[list[str], float]:
    c = run.config
    counts = _count(json.dumps(_section(c.model)), json.dumps(_section(c.data)))
    batch = c.data.batch_size * c.data.seq_len
    tokens = batch * c.train.num_steps
    flops = counts.flops_per_token * tokens
    cells = [
        run.name,
        status.of(run),
        formatting.count(counts.params_total),
        formatting.count(tokens),
        formatting.scientific(counts.flops_6n * tokens),
        formatting.scientific(flops),
        f"{c.optimizer.learning_rate:.3g}",
        f"{c.data.batch_size} x {c.data.seq_len}",
        f"{c.train.num_steps:,}",
    ]
    return cells, flops


def _section(section) -> dict:
    return json.loads(config_lib.to_json(section))


@functools.cache
def _count(model: str, data: str) -> accounting.Counts:
    """Counts of the model in a config section, given as JSON: many runs share theirs."""
    model, data = config_lib.from_json(model), config_lib.from_json(data)
    vocab_size = model.vocab_size
    if not vocab_size and data.task.name != "none":
        vocab_size = batches.open_source(data).vocab_size
    vocab_size = vocab_size or _vocab_size(
        data.sources, data.tokenizer, data.val_permille, data.path, data.cache_dir
    )
    return accounting.count(build.abstract(model, vocab_size=vocab_size), data.seq_len)


@functools.cache
def _vocab_size(
    sources: tuple[str, ...], tokenizer: str, val_permille: int, path: str, cache_dir: str
) -> int:
    found = dataset.find_or_prepare(
        sources, tokenizer, val_permille, path=path, cache_dir=cache_dir
    )
    return found.vocab_size
