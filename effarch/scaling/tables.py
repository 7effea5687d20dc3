"""Tables of runs: a CSV file as a dict of equally long numpy columns."""

import csv
import os
from collections.abc import Mapping

import numpy as np

from effarch import names

Table = Mapping[str, np.ndarray]
"""Column name -> values [runs]: float64 where every cell is a number or empty (nan), else text."""


def read_csv(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """The columns of a CSV file with a header line. Raises ValueError for a ragged or empty one."""
    with open(path, encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))
    if len(rows) < 2:
        raise ValueError(f"{path} holds no runs; it needs a header line and a line for each run.")
    for number, row in enumerate(rows, start=1):
        if len(row) != len(rows[0]):
            raise ValueError(
                f"{path}, line {number} has {len(row)} cells, the header {len(rows[0])}; repair it."
            )
    return {name: _column(cells) for name, cells in zip(rows[0], zip(*rows[1:]))}


def where(table: Table, **values) -> dict[str, np.ndarray]:
    """The rows in which every named column has the given value."""
    keep = np.ones(num_rows(table), bool)
    for name, value in values.items():
        keep &= names.lookup(table, name, "column") == value
    return take(table, keep)


def take(table: Table, rows: np.ndarray) -> dict[str, np.ndarray]:
    """The rows of a mask or of indices."""
    return {name: column[rows] for name, column in table.items()}


def numbers(table: Table, name: str) -> np.ndarray:
    """A column as float64. Raises ValueError if the table lacks it or it holds text."""
    column = names.lookup(table, name, "column")
    if not np.issubdtype(np.asarray(column).dtype, np.number):
        raise ValueError(f"column {name} holds text, such as {str(column[0])!r}; give numbers.")
    return np.asarray(column, np.float64)


def num_rows(table: Table) -> int:
    return len(next(iter(table.values())))


def _column(cells: tuple[str, ...]) -> np.ndarray:
    try:
        return np.array([cell or "nan" for cell in cells], np.float64)
    except ValueError:
        return np.array(cells)
