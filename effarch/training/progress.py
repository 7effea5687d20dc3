"""One line that says how a run is doing: live in a terminal, a plain line now and then in a log.

Rates are over a recent window: the steps and the seconds of an interval both lose weight by a
factor e every `WINDOW` seconds, and a rate is their quotient. Time inside `pause` (compilation,
evaluation, checkpoints) is no part of the rates; nor is compilation part of the remaining time.
"""

import contextlib
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TextIO

import rich.console
import rich.file_proxy
import rich.progress
import rich.table
import rich.text
from absl import logging

from effarch.training import formatting

WINDOW = 30.0
"""Seconds after which an interval weighs 1/e in the rates."""
COMPILE = "compile"
_BAR_FROM_COLUMNS = 120
_VERBATIM = {"markup": False, "highlight": False, "emoji": False, "soft_wrap": True}


class Progress:
    """Shows steps, loss, speed and the time that is left, and computes the rates for the metrics.

    tokens_per_step and flops_per_step are of the whole run, flops_per_step is the model's, forward
    and backward, hardware_flops_per_step what is really computed, and peak_flops (per second) is the
    sum over all devices; without one of the last three there is no MFU or no HFU. `log_every` is in
    seconds and counts outside terminals only. The first interval holds warm-up and, if the loop does
    not compile apart, compilation: no rate has it in.
    """

    def __init__(
        self,
        total_steps: int,
        *,
        start_step: int = 0,
        tokens_per_step: float,
        flops_per_step: float | None = None,
        hardware_flops_per_step: float | None = None,
        peak_flops: float | None = None,
        console: rich.console.Console | None = None,
        log_every: float = 15.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.total_steps = total_steps
        self.step = self._start_step = start_step
        self.seconds: dict[str, float] = {}
        """Wall-clock seconds by the name given to `pause`."""
        self._tokens_per_step = tokens_per_step
        self._flops_per_step = {"mfu": flops_per_step, "hfu": hardware_flops_per_step}
        self._peak_flops = peak_flops
        self._console = console or stderr_console()
        self._log_every = log_every
        self._clock = clock
        self._begin = self._last = clock()
        self._last_pauses = 0.0
        self._window_steps = self._window_seconds = 0.0
        self._updates = 0
        self._paused: tuple[str, float] | None = None
        self._shown: dict[str, float] = {}
        self._printed_step: int | None = None
        self._printed_at = -math.inf
        self._live = self._start_live() if is_terminal(self._console) else None

    def update(self, step: int, loss: float, extra: Mapping[str, float] | None = None) -> None:
        """Tells that `step` steps are done, the loss of the last one and other numbers to show."""
        now = self._clock()
        pauses = sum(self.seconds.values())
        busy = now - self._last - (pauses - self._last_pauses)
        if self._updates and step > self.step:
            keep = math.exp(-busy / WINDOW)
            self._window_steps = keep * self._window_steps + (step - self.step)
            self._window_seconds = keep * self._window_seconds + busy
        self.step, self._last, self._last_pauses = step, now, pauses
        self._updates += 1
        self._shown = {"loss": float(loss), **{k: float(v) for k, v in (extra or {}).items()}}
        if self._live:
            self._live.update(self._live.task_ids[0], completed=step)
        elif now - self._printed_at >= self._log_every or step >= self.total_steps:
            self._print_line()

    def rates(self) -> dict[str, float]:
        """time/step_seconds, time/tokens_per_second, time/mfu, time/hfu; {} before the second update."""
        if not (self._window_steps and self._window_seconds > 0):
            return {}
        step_seconds = self._window_seconds / self._window_steps
        rates = {
            "time/step_seconds": step_seconds,
            "time/tokens_per_second": self._tokens_per_step / step_seconds,
        }
        for name, flops in self._flops_per_step.items():
            if flops and self._peak_flops:
                rates[f"time/{name}"] = flops / step_seconds / self._peak_flops
        return rates

    def eta(self) -> float | None:
        """Seconds to the last step: the present speed and, a step, the mean of pauses so far."""
        rates, done = self.rates(), self.step - self._start_step
        if not rates or not done:
            return None
        pauses = sum(seconds for name, seconds in self.seconds.items() if name != COMPILE) / done
        return max(self.total_steps - self.step, 0) * (rates["time/step_seconds"] + pauses)

    def elapsed(self) -> float:
        """Wall-clock seconds since construction, pauses included."""
        return self._clock() - self._begin

    @contextlib.contextmanager
    def pause(self, name: str) -> Iterator[None]:
        """Leaves the time inside out of the rates and adds it to `seconds[name]`.

        name: "compile" (also left out of the remaining time), "evaluation", "checkpoint", ...
        A pause inside a pause counts for the outer one only.
        """
        if self._paused is not None:
            yield
            return
        begin = self._clock()
        self._paused = (name, begin)
        try:
            yield
        finally:
            self._paused = None
            spent = self._clock() - begin
            # A new dict, because the thread that redraws the line may be reading the old one.
            self.seconds = {**self.seconds, name: self.seconds.get(name, 0.0) + spent}
        if name == COMPILE:
            self.note(f"compiled in {formatting.duration(spent)}")

    def note(self, text: str) -> None:
        """Prints a line above the progress line: an evaluation's result, a checkpoint saved."""
        self._console.print(text, **_VERBATIM)

    def finish(self) -> None:
        """Ends the display and leaves its last state behind; a second call does nothing."""
        if self._live:
            self._live.stop()
            self._live = None
            _log_to(sys.stderr)
        if self._updates and self._printed_step != self.step:
            self._print_line()

    def line(self) -> str:
        """The state as one line of text."""
        width = len(f"{self.total_steps:,}")
        percent = 100 * self.step / max(self.total_steps, 1)
        parts = [f"step {self.step:>{width},}/{self.total_steps:,} {math.floor(percent):3d}%"]
        parts += [f"{name} {_short(value)}" for name, value in self._shown.items()]
        rates = self.rates()
        if rates:
            parts.append(f"{formatting.count(rates['time/tokens_per_second'])} tokens/s")
        if "time/mfu" in rates:
            parts.append(f"MFU {100 * rates['time/mfu']:.1f}%")
        paused = self._paused
        if paused is not None:
            name, begin = paused
            parts.append(f"{name} {formatting.duration(self._clock() - begin)}")
        elif (eta := self.eta()) is not None and self.step < self.total_steps:
            parts.append(f"ETA {formatting.duration(eta)}")
        return "  ".join([*parts, f"elapsed {formatting.duration(self.elapsed())}"])

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exception) -> None:
        self.finish()

    def _print_line(self) -> None:
        self._printed_at, self._printed_step = self._clock(), self.step
        self.note(self.line())

    def _start_live(self) -> rich.progress.Progress:
        columns: list[rich.progress.ProgressColumn] = [_LineColumn(self)]
        if self._console.width >= _BAR_FROM_COLUMNS:
            columns.insert(0, rich.progress.BarColumn(bar_width=16))
        live = rich.progress.Progress(
            *columns, console=self._console, transient=True, refresh_per_second=4
        )
        live.add_task("", total=self.total_steps, completed=self.step)
        live.start()
        _log_to(sys.stderr)  # By now rich's proxy, which prints above the live line.
        return live


class _LineColumn(rich.progress.ProgressColumn):
    """The text of the live line, cut at the terminal's edge."""

    def __init__(self, progress: Progress) -> None:
        super().__init__(rich.table.Column(no_wrap=True, overflow="ellipsis"))
        self._progress = progress

    def render(self, task: rich.progress.Task) -> rich.text.Text:
        return rich.text.Text(self._progress.line(), no_wrap=True, overflow="ellipsis")


def header(console: rich.console.Console | None, rows: Sequence[tuple[str, object]]) -> None:
    """Prints what is about to run, one (name, value) a line: model, parameters, devices, data."""
    _table(console or stderr_console(), rows)


def summary(console: rich.console.Console | None, rows: Sequence[tuple[str, object]]) -> None:
    """Prints how it went, one (name, value) a line, below an empty line."""
    console = console or stderr_console()
    console.print()
    _table(console, rows)


def stderr_console() -> rich.console.Console:
    """A console on stderr that writes no control characters unless stderr is a terminal.

    rich alone would take FORCE_COLOR, which many CI systems set, for a terminal.
    """
    if sys.stderr.isatty():
        return rich.console.Console(stderr=True)
    return rich.console.Console(stderr=True, force_terminal=False, force_jupyter=False, width=100)


def silent_console() -> rich.console.Console:
    """For the processes of a run that leave showing it to process 0."""
    return rich.console.Console(quiet=True, force_terminal=False, force_jupyter=False)


def is_terminal(console: rich.console.Console) -> bool:
    """Whether a line can be redrawn in place."""
    isatty = getattr(console.file, "isatty", lambda: False)
    return console.is_terminal and not console.is_dumb_terminal and bool(isatty())


def _log_to(stream: TextIO) -> None:
    """Points absl's log at a stream: it would go on with the stderr it saw at import."""
    handler = logging.get_absl_handler().python_handler
    if isinstance(handler.stream, rich.file_proxy.FileProxy) or handler.stream is sys.__stderr__:
        handler.setStream(stream)


def _table(console: rich.console.Console, rows: Sequence[tuple[str, object]]) -> None:
    cells = [(str(name), formatting.value(item)) for name, item in rows]
    if not is_terminal(console):
        width = max((len(name) for name, _ in cells), default=0)
        for name, text in cells:
            console.print(f"{name:{width}}  {text}".rstrip(), **_VERBATIM)
        return
    table = rich.table.Table.grid(padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, text in cells:
        table.add_row(rich.text.Text(name), rich.text.Text(text))
    console.print(table)


def _short(number: float) -> str:
    """A fixed width for the usual range, so that the live line does not jump."""
    if math.isfinite(number) and 1e-3 <= abs(number) < 1e4:
        return f"{number:.4f}" if abs(number) < 100 else f"{number:.1f}"
    return f"{number:.3g}"
