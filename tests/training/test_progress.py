"""The progress line: its arithmetic with a clock of our own, and what it prints where."""

import io
import math
import os
import pty
import re
import subprocess
import sys

import pytest
import rich.console

from effarch.training import formatting, progress

_CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f]")


class Clock:
    """A clock that stands still unless it is told otherwise."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def log():
    return io.StringIO()


def _progress(clock, log, total=100, **options):
    console = rich.console.Console(file=log, width=80)
    options = {"tokens_per_step": 1000, **options}
    return progress.Progress(total, console=console, clock=clock, **options)


def test_rates_and_remaining_time_at_a_steady_pace(clock, log):
    flops = dict(flops_per_step=6e9, hardware_flops_per_step=8e9, peak_flops=1e10)
    shown = _progress(clock, log, **flops)
    assert shown.rates() == {} and shown.eta() is None
    for step in range(1, 21):
        clock.now += 2.0
        shown.update(step, 1.0)
    assert shown.rates() == pytest.approx(
        {
            "time/step_seconds": 2.0,
            "time/tokens_per_second": 500.0,
            "time/mfu": 0.3,
            "time/hfu": 0.4,
        }
    )
    assert shown.eta() == pytest.approx(160.0)
    assert shown.elapsed() == pytest.approx(40.0)
    assert "step  20/100  20%" in shown.line() and "ETA 2:40" in shown.line()
    assert "500 tokens/s  MFU 30.0%" in shown.line()


def test_without_a_peak_there_is_no_mfu(clock, log):
    shown = _progress(clock, log, flops_per_step=6e9)
    for step in (1, 2):
        clock.now += 1.0
        shown.update(step, 1.0)
    assert set(shown.rates()) == {"time/step_seconds", "time/tokens_per_second"}
    assert "MFU" not in shown.line()


def test_compilation_is_apart_from_rates_and_remaining_time(clock, log):
    shown = _progress(clock, log)
    with shown.pause("compile"):
        clock.now += 500.0
    for step in range(1, 11):
        if step == 6:  # the batch grows: the step is compiled again
            with shown.pause("compile"):
                clock.now += 300.0
        clock.now += 1.0
        shown.update(step, 1.0)
    assert shown.seconds == {"compile": 800.0}
    assert shown.rates()["time/step_seconds"] == pytest.approx(1.0)
    assert shown.eta() == pytest.approx(90.0)
    assert shown.elapsed() == pytest.approx(810.0)
    assert "compiled in 8:20" in log.getvalue() and "compiled in 5:00" in log.getvalue()


def test_a_first_step_that_compiles_is_in_no_rate(clock, log):
    shown = _progress(clock, log)
    clock.now += 700.0
    shown.update(1, 1.0)
    assert shown.rates() == {}
    clock.now += 3.0
    shown.update(2, 1.0)
    assert shown.rates()["time/step_seconds"] == pytest.approx(3.0)


def test_evaluations_are_in_the_remaining_time_but_in_no_rate(clock, log):
    shown = _progress(clock, log)
    for step in range(1, 41):
        clock.now += 1.0
        shown.update(step, 1.0)
        if step % 10 == 0:
            with shown.pause("evaluation"), shown.pause("checkpoint"):
                clock.now += 5.0
    assert shown.seconds == {"evaluation": 20.0}  # a pause inside counts for the outer one
    assert shown.rates()["time/step_seconds"] == pytest.approx(1.0)
    assert shown.eta() == pytest.approx(60 * 1.0 + 6 * 5.0)


def test_the_window_forgets_exponentially(clock, log):
    shown = _progress(clock, log)
    intervals = [(1, 9.0), (4, 2.0), (4, 2.0), (2, 10.0)]  # (steps, seconds); the first is left out
    step = 0
    for steps, seconds in intervals:
        step += steps
        clock.now += seconds
        shown.update(step, 1.0)
    weights = [math.exp(-12 / 30), math.exp(-10 / 30), 1.0]  # by the age of an interval's end
    steps = sum(w * s for w, (s, _) in zip(weights, intervals[1:]))
    seconds = sum(w * t for w, (_, t) in zip(weights, intervals[1:]))
    assert shown.rates()["time/step_seconds"] == pytest.approx(seconds / steps)


def test_a_resumed_run_counts_from_its_checkpoint(clock, log):
    shown = _progress(clock, log, start_step=80)
    for step in (81, 82):
        clock.now += 4.0
        shown.update(step, 1.0)
    assert shown.rates()["time/step_seconds"] == pytest.approx(4.0)
    assert shown.eta() == pytest.approx(72.0)
    with shown.pause("evaluation"):
        clock.now += 10.0
    assert shown.eta() == pytest.approx(18 * (4.0 + 10.0 / 2))
    assert "step  82/100  82%" in shown.line()


def test_a_log_gets_a_line_now_and_then_and_the_last_one(clock, log):
    with _progress(clock, log, log_every=10.0) as shown:
        for step in range(1, 96):
            clock.now += 1.0
            shown.update(step, math.nan if step == 95 else 2.5, {"grad_norm": 0.125})
            if step == 50:
                shown.note("evaluation at step 50: [bold]1.234[/bold] bits per byte :smile:")
    lines = log.getvalue().splitlines()
    steps = [int(re.search(r"step +(\d+)/", line)[1]) for line in lines if "/100" in line]
    assert steps == [1, 11, 21, 31, 41, 51, 61, 71, 81, 91, 95]
    assert "evaluation at step 50: [bold]1.234[/bold] bits per byte :smile:" in lines
    assert "loss 2.5000  grad_norm 0.1250" in lines[0] and "loss nan" in lines[-1]


def test_the_last_step_is_printed_once(clock, log):
    with _progress(clock, log, total=3) as shown:
        for step in (1, 2, 3):
            clock.now += 0.1
            shown.update(step, 1.0)
    lines = log.getvalue().splitlines()
    assert [line.split()[1] for line in lines] == ["1/3", "3/3"]
    assert "ETA" not in lines[-1]


_PROGRAM = """
import logging, time
from absl import flags, logging as absl_logging
from effarch.training import progress
flags.FLAGS(["program"])  # as app.run does; absl then writes to the stderr that it saw at import
absl_logging.use_absl_handler()
progress.header(None, [("model", "attention/glu [4]"), ("parameters", 1234567), ("rate", 3e-4)])
with progress.Progress(4, tokens_per_step=10) as shown:
    for step in range(1, 5):
        time.sleep(0.02)
        shown.update(step, 1.0)
        if step == 2:
            shown.note("a note")
            logging.warning("a warning")
progress.summary(None, [("final loss", 1.0)])
"""


def _environment():
    # Many CI systems set FORCE_COLOR; it must not make a file a terminal.
    return {**os.environ, "FORCE_COLOR": "1", "TERM": "xterm-256color", "COLUMNS": "90"}


def test_forced_colours_make_no_terminal_of_a_file(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert not progress.stderr_console().is_terminal


def test_no_control_characters_where_stderr_is_no_terminal():
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM], env=_environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert not _CONTROL.search(done.stderr), repr(done.stderr)
    lines = [line for line in done.stderr.splitlines() if "warning" not in line.lower()]
    assert lines[:3] == [
        "model       attention/glu [4]",
        "parameters  1,234,567",
        "rate        0.0003",
    ]
    assert [line.split()[:2] for line in lines[3:6]] == [
        ["step", "1/4"],
        ["a", "note"],
        ["step", "4/4"],
    ]
    assert lines[6:] == ["", "final loss  1"]


def test_a_terminal_gets_a_live_line_and_is_left_tidy():
    parent, child = pty.openpty()
    process = subprocess.Popen([sys.executable, "-c", _PROGRAM], env=_environment(), stderr=child)
    os.close(child)
    output = b""
    while True:
        try:
            data = os.read(parent, 4096)
        except OSError:  # the other end was closed
            break
        if not data:
            break
        output += data
    assert process.wait() == 0
    os.close(parent)
    text = output.decode()
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h") == 1  # the cursor is shown again
    # Erased to the line's start before the note, the log and the last line are printed.
    assert re.search(r"\x1b\[2Ka note\r\n", text)
    assert re.search(r"\x1b\[2KW\d{4} [^\n]* a warning\r\n", text)
    assert re.search(r"\x1b\[2Kstep 4/4 100%", text)


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0"), (7, "7"), (999, "999"), (999.6, "1.00k"), (1234, "1.23k"), (12345, "12.3k"),
        (999_600, "1.00M"), (123_456_789, "123M"), (7.5e9, "7.50B"), (1.5e13, "15.0T"),
        (3e18, "3.00e18"), (0.25, "0.250"), (1.5e-7, "1.50e-7"), (9.996, "10.0"), (-1234, "-1.23k"),
        (math.nan, "nan"),
    ],
)  # fmt: skip
def test_counts(number, text):
    assert formatting.count(number) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0.0 s"), (59.94, "59.9 s"), (59.96, "1:00"), (245, "4:05"), (3599.6, "1:00:00"),
        (7384, "2:03:04"), (93784, "1d 02:03:04"), (math.inf, "unknown"),
    ],
)  # fmt: skip
def test_durations(seconds, text):
    assert formatting.duration(seconds) == text
