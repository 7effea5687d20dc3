"""What an experiment's script leaves behind: figures as JSON, a table in its README.

The README holds `<!-- table:NAME -->` and `<!-- end -->`; what lies between is written by the script,
so that no number in it is typed by hand.
"""

import json
import os
import pathlib
import re
from collections.abc import Mapping, Sequence


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


def _rounded(value):
    if isinstance(value, Mapping):
        return {str(name): _rounded(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.6g}")
    return value
