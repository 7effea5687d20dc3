"""What an experiment's script leaves behind: results as JSON, figures, tables and text in its README.

The README holds `<!-- table:NAME -->` and `<!-- end -->`; what lies between is written by the script,
so that no number in it is typed by hand.
"""

import contextlib
import json
import os
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence

import matplotlib
import matplotlib.pyplot as plt
import numpy as np

from effarch.scaling import statistics


def write_json(path: str | os.PathLike, content: Mapping) -> None:
    """Writes results, numbers to 6 significant digits, making the folder."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(_rounded(content), indent=1) + "\n")


def write_table(
    readme: str | os.PathLike, name: str, header: Sequence[str], rows: Sequence[Sequence]
) -> None:
    """Replaces the table between the markers of that name. Raises ValueError if they are absent."""
    lines = [header, ["---"] * len(header), *rows]
    table = "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)
    write_text(readme, name, table)


def write_text(readme: str | os.PathLike, name: str, text: str) -> None:
    """Replaces the text between `<!-- table:NAME -->` and the next `<!-- end -->`."""
    path = pathlib.Path(readme)
    start, end = f"<!-- table:{name} -->", "<!-- end -->"
    pattern = re.compile(f"({re.escape(start)}\n).*?({re.escape(end)})", re.DOTALL)
    page, count = pattern.subn(lambda match: f"{match[1]}{text}\n{match[2]}", path.read_text())
    if count != 1:
        raise ValueError(f"{path} needs one pair {start} ... {end}, it has {count}.")
    path.write_text(page)


@contextlib.contextmanager
def panels(
    path: str | os.PathLike, columns: int = 1, *, size: tuple[float, float], **options
) -> Iterator[plt.Axes | np.ndarray]:
    """One axes, or as many beside each other, which are saved as PNG when the block ends.

    `size` is in inches; `options` are those of `plt.subplots`.
    """
    matplotlib.use("Agg")
    figure, axes = plt.subplots(1, columns, figsize=size, layout="constrained", **options)
    yield axes
    pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def bar(panel: plt.Axes, across: float, values: np.ndarray, label: str) -> None:
    """A point at the mean of the values, with a bar over their range."""
    mean = values.mean()
    ends = [[mean - values.min()], [values.max() - mean]]
    panel.errorbar(across, mean, yerr=ends, fmt="o", capsize=3, label=label)


def effort(rows: Sequence[Mapping]) -> str:
    """How many runs, and how long they took."""
    return f"{len(rows)} runs, {sum(row['seconds'] for row in rows) / 60:.0f} min in all."


def ranged(values: Sequence[float]) -> str:
    """The mean, and behind it the range over seeds if there are several."""
    spread = f" ({min(values):.3f} to {max(values):.3f})" if len(values) > 1 else ""
    return f"{np.mean(values):.3f}{spread}"


def interval(values: np.ndarray) -> str:
    """Mean and 95 % interval over seeds; one value alone, nothing of none."""
    if len(values) < 2:
        return f"{values[0]:+.4f}" if len(values) else ""
    found = statistics.over_seeds(values)
    return f"{found.mean:+.4f} ({found.low:+.4f} to {found.high:+.4f})"


def judged(found: statistics.Interval, most: float = 0.0) -> str:
    """Whether a claim holds that the mean is at most `most`."""
    if found.high <= most:
        return "holds"
    return "fails" if found.low > most else "is not decided by these seeds"


def claim(text: str, values: np.ndarray, mean: str, *, most: float = 0.0) -> str:
    """A sentence: the claim that the mean is at most `most`, whether it holds, and the evidence.

    `mean` says what the values are around a format of numbers, as in "loss {:+.2%}".
    """
    found = statistics.over_seeds(values)
    form = re.search(r"\{.*?\}", mean)[0]
    low, high = form.format(found.low), form.format(found.high)
    told = f"{mean.format(found.mean)}, 95 % interval {low} to {high}"
    return f"*{text}* {judged(found, most)} ({told})."


def _rounded(value):
    if isinstance(value, Mapping):
        return {str(name): _rounded(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.6g}")
    return value
