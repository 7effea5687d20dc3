"""The curves of the report: matplotlib figures as inline SVG that follows the page's colours."""

import dataclasses
import html
import io
import math
import re
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from effarch.training import formatting
from effarch.training.report_runs import Run, series

COLOURS = (
    "#3579c4", "#e0752f", "#2f9c6a", "#b35bb0", "#c79a1b", "#1fa3b3", "#d14b5a", "#7d6bc9",
)  # fmt: skip
# Written into the SVG and replaced by the page's variables, so that dark mode reaches the figures.
_INK, _GRID = "#010203", "#040506"
_MAX_POINTS = 1600
_SIZE_INCHES = (5.0, 2.75)
_FRAME = (0.15, 0.17, 0.83, 0.80)
"""Left, bottom, width and height of the axes as parts of the figure; the same in most figures."""
_TICK_CHARACTERS, _CHARACTER = 5, 0.018
"""What the frame has room for beside the unit, and the room for each more as a part of the figure."""


@dataclasses.dataclass(frozen=True)
class Curve:
    """Values over steps. `raw` curves get a smoothed one on top, others are drawn with points."""

    label: str
    colour: str
    steps: np.ndarray
    values: np.ndarray
    is_raw: bool = False
    style: str = "-"


@dataclasses.dataclass(frozen=True)
class Panel:
    """One figure. `levels` are horizontal lines: (label, height)."""

    title: str
    unit: str
    curves: list[Curve]
    scale: str = "linear"
    levels: Sequence[tuple[str, float]] = ()
    across: str = "step"


def panels(runs: Sequence[Run]) -> list[Panel]:
    """Every panel that has something to show."""
    key, title = "loss", "Training loss"
    if all(len(series(run.train, "ce")[0]) for run in runs):
        key, title = "ce", "Training cross-entropy"
    found = [
        Panel(title, "nats per token", over_runs(runs, "train", key, is_raw=True), "loss"),
        Panel("Validation loss", "nats per token", over_runs(runs, "evals", "loss"), "loss"),
        *_bits_panels(runs),
        Panel("Accuracy", "share of what is scored", over_runs(runs, "evals", "accuracy"), "zero"),
        Panel("Learning rate", "learning rate", over_runs(runs, "train", "learning_rate")),
        Panel("Gradient norm", "norm", over_runs(runs, "train", "grad_norm", is_raw=True), "log"),
        Panel(
            "Speed",
            "tokens per second",
            over_runs(runs, "train", "time/tokens_per_second", is_raw=True),
            "zero",
        ),
    ]
    return [panel for panel in found if panel.curves]


def of_analyses(analyses: Mapping[str, dict]) -> list[Panel]:
    """The figures in the results of `effarch.analysis`: {figures: [{title, unit, across, scale, curves:
    [{label, x, y}]}]}. One that is not so is left out."""
    found = []
    for result in analyses.values():
        for spec in result.get("figures", ()):
            try:
                curves = [
                    Curve(str(one["label"]), colour(index), *_finite(one["x"], one["y"]))
                    for index, one in enumerate(spec["curves"])
                ]
                words = [str(spec[name]) for name in ("title", "unit", "scale", "across")]
            except (KeyError, TypeError, ValueError):
                continue
            curves = [curve for curve in curves if len(curve.steps)]
            if curves:
                found.append(Panel(*words[:2], curves, words[2], across=words[3]))
    return found


def _finite(x, y) -> tuple[np.ndarray, np.ndarray]:
    x, y = (np.asarray(values, dtype=np.float64) for values in (x, y))
    kept = np.isfinite(x) & np.isfinite(y)
    return x[kept], y[kept]


def figure(panel: Panel, name: str, *, is_named: bool = False) -> str:
    """The panel as an HTML `figure`; `name` must be its own on the page.

    `is_named`: a curve is named even if it is the only one.
    """
    title = html.escape(panel.title)
    labels = [(curve.label, curve.colour, curve.style) for curve in panel.curves]
    labels += [(f"{label} {height:.3f}", _GRID, ":") for label, height in panel.levels]
    is_named = is_named or len(labels) > 1
    legend = "".join(_legend_entry(*entry) for entry in labels) if is_named else ""
    top, highest = _top(panel), max(curve.values.max() for curve in panel.curves)
    if top < highest:
        legend += f"<span>Values up to {highest:.4g} lie above the frame.</span>"
    return (
        f"<figure><figcaption><h3>{title}</h3>"
        f'<div class="legend">{legend}</div></figcaption>{_svg(panel, name)}</figure>'
    )


def smooth(values: np.ndarray) -> np.ndarray:
    """Exponential mean over a window that grows, so that it does not lag behind the steep start.

    m_i = m_(i-1) + (x_i - m_(i-1)) / w_i, w_i = i/10 points, at least 1, at most n/50 (i from 1).
    """
    mean, widest = 0.0, max(1.0, len(values) / 50)
    result = np.empty(len(values))
    for index, value in enumerate(values):
        mean += (value - mean) / min(max(1.0, (index + 1) / 10), widest)
        result[index] = mean
    return result


def thin(steps: np.ndarray, values: np.ndarray, points: int) -> tuple[np.ndarray, np.ndarray]:
    """At most about `points` points that keep the lowest and the highest of every bucket."""
    if len(steps) <= points:
        return steps, values
    kept = {0, len(steps) - 1}
    for bucket in np.array_split(np.arange(len(steps)), max(points // 2, 1)):
        kept |= {int(bucket[np.argmin(values[bucket])]), int(bucket[np.argmax(values[bucket])])}
    index = np.asarray(sorted(kept))
    return steps[index], values[index]


def colour(index: int) -> str:
    """The colour of the run, or source, of that number."""
    return COLOURS[index % len(COLOURS)]


def over_runs(runs: Sequence[Run], kind: str, key: str, *, is_raw: bool = False) -> list[Curve]:
    """One curve for each run that has finite values of `key`."""
    curves = []
    for index, run in enumerate(runs):
        style = ("-", "--", "-.", ":")[index // len(COLOURS) % 4]
        curve = _curve(run.name, index, getattr(run, kind), key, is_raw=is_raw, style=style)
        curves += [curve] if len(curve.steps) else []
    return curves


def _curve(label: str, index: int, records: list[dict], key: str, **options) -> Curve:
    steps, values = series(records, key)
    finite = np.isfinite(values)
    return Curve(label, colour(index), steps[finite], values[finite], **options)


def _bits_panels(runs: Sequence[Run]) -> list[Panel]:
    """One run: all sources in one panel. Several: a panel for the whole and one for each source."""
    unit, key = "bits per byte", "bits_per_byte"
    if len(runs) > 1:
        sources = list(dict.fromkeys(source for run in runs for source in run.sources))
        parts = [("Bits per byte", key)]
        parts += [(f"Bits per byte: {source}", f"{source}/{key}") for source in sources]
        return [Panel(title, unit, over_runs(runs, "evals", name), "loss") for title, name in parts]
    run = runs[0]
    parts = [("all" if run.sources else "validation", key)]
    parts += [(source, f"{source}/{key}") for source in run.sources]
    curves = [_curve(label, i, run.evals, name) for i, (label, name) in enumerate(parts)]
    yardsticks = [(name, run.figure(f"{name}_bits_per_byte")) for name in ("gzip", "xz")]
    levels = [(name, height) for name, height in yardsticks if height is not None]
    curves = [curve for curve in curves if len(curve.steps)]
    return [Panel("Validation, bits per byte", unit, curves, "loss", levels)]


def _svg(panel: Panel, name: str) -> str:
    def draw(drawing) -> None:
        axes = drawing.add_axes(_FRAME)
        for curve in panel.curves:
            _draw(axes, curve, _MAX_POINTS // len(panel.curves))
        for _, height in panel.levels:
            axes.axhline(height, color=_INK, alpha=0.6, linewidth=1, linestyle=":")
        _dress(axes, panel)

    return inline(draw, panel.title, name)


def inline(draw: Callable, title: str, name: str, size: tuple[float, float] = _SIZE_INCHES) -> str:
    """What `draw` puts on a matplotlib figure of `size` inches, as SVG for the page."""
    import matplotlib  # Slow to import, and most callers of this package draw nothing.
    from matplotlib.figure import Figure

    style = {
        "svg.fonttype": "none",
        "svg.hashsalt": name,
        "font.size": 10.0,
        "text.color": _INK,
        "axes.labelcolor": _INK,
        "xtick.color": _INK,
        "ytick.color": _INK,
        "path.simplify_threshold": 0.2,
    }
    with matplotlib.rc_context(style):
        drawing = Figure(figsize=size)
        draw(drawing)
        buffer = io.StringIO()
        drop = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        drawing.savefig(buffer, format="svg", transparent=True, metadata=drop)
    return _for_page(buffer.getvalue(), title, name)


def _draw(axes, curve: Curve, points: int) -> None:
    look = {"color": curve.colour, "solid_joinstyle": "round", "linestyle": curve.style}
    if not curve.is_raw or len(curve.steps) < 20:
        marker = "o" if len(curve.steps) <= 40 else None
        axes.plot(
            *thin(curve.steps, curve.values, points), **look, linewidth=1.6, marker=marker, ms=3
        )
        return
    raw = {**look, "linestyle": "-", "linewidth": 0.6, "alpha": 0.3}
    axes.plot(*thin(curve.steps, curve.values, points), **raw)
    every = math.ceil(len(curve.steps) / max(points // 2, 1))
    # Backwards, so that the last point is always there.
    line = [array[::-1][::every][::-1] for array in (curve.steps, smooth(curve.values))]
    axes.plot(*line, **look, linewidth=1.6)


def _dress(axes, panel: Panel) -> None:
    """Scale, limits, ticks, grid and labels."""
    from matplotlib import ticker

    low = min(curve.values.min() for curve in panel.curves)
    top = _top(panel)
    ratio = top / low if low > 0 else 0.0
    number = ticker.FuncFormatter(lambda value, _: _tick(value))
    if ratio > 2.5 and panel.scale in ("log", "loss"):
        axes.set_yscale("log")
        digits = (1, 1.5, 2, 3, 4, 5, 6, 8) if ratio < 10 else (1, 2, 5) if ratio < 300 else (1,)
        axes.yaxis.set_major_locator(ticker.LogLocator(subs=digits, numticks=9))
        axes.yaxis.set_minor_locator(ticker.NullLocator())
    else:
        axes.yaxis.set_major_locator(ticker.MaxNLocator(6, steps=(1, 2, 2.5, 5, 10)))
    axes.xaxis.set_major_locator(ticker.MaxNLocator(6, steps=(1, 2, 5, 10), integer=True))
    axes.yaxis.set_major_formatter(number)
    axes.xaxis.set_major_formatter(number)
    axes.set_xlabel(panel.across)
    axes.set_ylabel(panel.unit)
    axes.margins(x=0.02)
    if panel.scale == "zero":
        axes.set_ylim(0, 1.12 * max(top, 1e-9))
    elif top > low:
        room = 1.0 if axes.get_yscale() == "linear" else low / top
        axes.set_ylim(low - 0.06 * room * (top - low), top + 0.06 * (top - low))
    longest = max(len(_tick(tick)) for tick in axes.get_yticks())
    more = _CHARACTER * max(longest - _TICK_CHARACTERS, 0)
    axes.set_position((_FRAME[0] + more, _FRAME[1], _FRAME[2] - more, _FRAME[3]))
    axes.grid(color=_GRID, linewidth=0.6)
    axes.tick_params(length=0, pad=5)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(_GRID)


def _top(panel: Panel) -> float:
    """The highest value to show. Of a loss: past the first twentieth, where it falls steeply."""
    highest = max(curve.values.max() for curve in panel.curves)
    if panel.scale != "loss" or min(len(curve.steps) for curve in panel.curves) < 6:
        return highest
    heights = [height for _, height in panel.levels]
    for curve in panel.curves:
        values = smooth(curve.values) if curve.is_raw else curve.values
        heights.append(values[curve.steps >= curve.steps[-1] / 20].max())
    return min(max(heights), highest)


def _tick(value: float) -> str:
    """1.5k, 20B, 1e-4: without the zeros at the end."""
    if not value or 1e-3 <= abs(value) < 1e3:
        return f"{value:g}"
    text = formatting.scientific(value) if abs(value) < 1 else formatting.count(value)
    return re.sub(r"\.(?=[kMBTe]|$)", "", re.sub(r"(\.\d*?)0+(?=[kMBTe]|$)", r"\1", text))


def _for_page(svg: str, title: str, name: str) -> str:
    """Inline SVG: no prolog, ids of its own, the page's fonts and colours, short coordinates."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<!--.*?-->", "", svg, flags=re.S)
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r"url\(#", f"url(#{name}-", svg)
    svg = re.sub(r'href="#', f'href="#{name}-', svg)
    svg = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font: \1px var(--sans)", svg)
    svg = re.sub(r' d="[^"]*"', lambda path: _short_path(path.group()), svg)
    svg = svg.replace(_INK, "var(--muted)").replace(_GRID, "var(--line)")
    size = re.search(r'viewBox="[^"]*"', svg)
    label = html.escape(title, quote=True)
    head = f'<svg role="img" aria-label="{label}" {size.group()} xmlns="http://www.w3.org/2000/svg"'
    return re.sub(r"<svg[^>]*", f'{head} xmlns:xlink="http://www.w3.org/1999/xlink"', svg, count=1)


def _short_path(path: str) -> str:
    """A tenth of a point is finer than a screen shows."""
    return re.sub(r"\s+", " ", re.sub(r"(\d+\.\d)\d+", r"\1", path))


def _legend_entry(label: str, colour: str, style: str) -> str:
    line = {"-": "solid", "--": "dashed", "-.": "dashed", ":": "dotted"}[style]
    colour = colour.replace(_GRID, "var(--muted)")
    return f'<span><i style="border-top: 3px {line} {colour}"></i>{html.escape(label)}</span> '
