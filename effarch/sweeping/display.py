"""How a sweep shows itself: a live table in a terminal, a line for each event in a log."""

from collections.abc import Iterable, Sequence
from typing import Any

import rich.live
import rich.table
import rich.text

from effarch.sweeping import status
from effarch.sweeping.plan import Run
from effarch.training import formatting, progress

_STYLES = {status.FINISHED: "green", status.FAILED: "red", status.RUNNING: "bold"}
_OTHER_LINES = 3
"""Of the table: its head, the caption, and the cursor's."""
_LONGEST_LABEL = 48
_VERBATIM = {"markup": False, "highlight": False, "emoji": False, "soft_wrap": True}


class Display:
    """Shows the runs of a sweep while they are worked on."""

    def __init__(self, runs: Sequence[Run], *, console=None) -> None:
        self._runs, self._console = list(runs), console or progress.stderr_console()
        self._live = None
        if progress.is_terminal(self._console):
            self._live = rich.live.Live(console=self._console, refresh_per_second=2)
        self._settled: dict[str, list[str]] = {}

    def __enter__(self) -> "Display":
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *exception) -> None:
        if self._live:
            self.update(set())
            self._live.stop()

    def update(self, active: set[str]) -> None:
        """Draws the table again; `active` are the names of the runs that were started."""
        if self._live:
            self._live.update(self._table(active), refresh=True)

    def start(self, finished: int, failed: int) -> None:
        hint = f"; {failed} of these failed, --retry_failed runs them again" if failed else ""
        settled = finished + failed
        self._note(f"sweep of {len(self._runs)} runs, {settled} of them settled before{hint}")

    def started(self, run: Run, *, resumed: bool) -> None:
        self._note(f"{run.name} {'resumed' if resumed else 'started'}  {describe(run)}")

    def finished(self, run: Run) -> None:
        summary = status.summary(run)
        loss = figure(summary.get("val/loss"))
        seconds = formatting.duration(summary.get("seconds", 0))
        self._note(f"{run.name} finished  validation loss {loss}, {seconds}")

    def stopped(self, run: Run) -> None:
        self._note(f"{run.name} stopped at step {status.last_record(run).get('step', 0)}")

    def failed(self, run: Run, reason: str) -> None:
        self._note(f"{run.name} failed  {reason}  (more in {run.failure})")

    def _note(self, text: str) -> None:
        self._console.print(text, **_VERBATIM)

    def _table(self, active: set[str]) -> rich.table.Table:
        table = rich.table.Table(box=None, pad_edge=False)
        for name in ("run", "status", "changes", "step", "loss", "val loss", "bits/byte", "time"):
            table.add_column(name, no_wrap=name != "changes", overflow="ellipsis")
        counts: dict[str, int] = {}
        rows = []
        for run in self._runs:
            cells = self._settled.get(run.name) or _cells(run, active)
            if cells[1] in (status.FINISHED, status.FAILED):
                self._settled[run.name] = cells  # Its files need not be read again.
            counts[cells[1]] = counts.get(cells[1], 0) + 1
            rows.append(cells)
        for cells in _fitting(rows, self._console.height - _OTHER_LINES):
            line = [rich.text.Text(cell, no_wrap=True, overflow="ellipsis") for cell in cells]
            table.add_row(*line, style=_STYLES.get(cells[1]))
        table.caption = ", ".join(f"{count} {name}" for name, count in counts.items())
        return table


def describe(run: Run, *, without: Sequence[str] = ()) -> str:
    """`seed=1 width=256`: what the sweep set, each field by its shortest name that is unambiguous."""
    return " ".join(
        f"{_short_name(field, run.overrides)}={value:.4g}"
        if isinstance(value, float)
        else f"{_short_name(field, run.overrides)}={value}"
        for field, value in run.overrides.items()
        if field not in without
    )


def labels(runs: Sequence[Run]) -> list[str]:
    """What sets each run apart, for a page that compares them: `seed=1 width=256`.

    Their names where that is long, or not different.
    """
    found = []
    for run in runs:
        same = [
            field
            for field, value in run.overrides.items()
            if all(other.overrides.get(field) == value for other in runs)
        ]
        found.append(describe(run, without=same) or "base")
    tell = len(set(found)) == len(found) > 1 and max(map(len, found)) <= _LONGEST_LABEL
    return found if tell else [run.name for run in runs]


def outcome(run: Run, state: str) -> str:
    """What the sweep set and, of a failed run, the last line that it wrote."""
    return f"{describe(run)}: {status.reason(run)}" if state == status.FAILED else describe(run)


def _short_name(field: str, fields: Iterable[str]) -> str:
    parts = field.split(".")
    for length in range(1, len(parts)):
        ending = ".".join(parts[-length:])
        if sum(f".{other}".endswith(f".{ending}") for other in fields) == 1:
            return ending
    return field


def _fitting(rows: list[list[str]], room: int) -> list[list[str]]:
    """The rows that a terminal has room for: at work, then failed, lately finished, and next ones."""
    order = (status.RUNNING, status.FAILED, status.FINISHED)

    def urgency(index: int) -> tuple[int, int]:
        state = rows[index][1]
        if state in order:
            return order.index(state), -index
        return len(order), index

    chosen = sorted(range(len(rows)), key=urgency)[: max(room, 1)]
    return [rows[index] for index in sorted(chosen)]


def figure(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else "-"


def _cells(run: Run, active: set[str]) -> list[str]:
    state = status.RUNNING if run.name in active else status.of(run)
    record, summary = status.last_record(run), status.summary(run)
    seconds = summary.get("seconds")
    return [
        run.name,
        state,
        outcome(run, state),
        f"{record.get('step', 0):,}/{run.config.train.num_steps:,}",
        figure(record.get("loss")),
        figure(summary.get("val/loss")),
        figure(summary.get("val/bits_per_byte")),
        formatting.duration(seconds) if seconds is not None else "-",
    ]
