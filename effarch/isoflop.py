"""The best size at each training budget, from CSV files of runs: one architecture a file.

python -m effarch.isoflop runs/sweep-ladder-attention/results.csv runs/sweep-ladder-hybrid/results.csv \\
    --figure=isoflop.png

A file needs FLOPs, size and loss of each run; --columns names them. Runs of one budget and size are
seeds: they are averaged, and their spread is the noise behind the 95 % bands. Prints JSON: N* of each
budget, the exponent a of N* = k C^a, and how many times the FLOPs of the first architecture each other
needs for an equal loss (with three budgets or more).
"""

import argparse
import json
import pathlib
from collections.abc import Sequence

import numpy as np

from effarch import names
from effarch.scaling import isoflop, optima, tables

COLUMNS = {"flops": "flops_6nd", "size": "params_matmul", "loss": "val/loss"}
"""What is needed -> its column in the results of a sweep."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Reads the flags, finds the optima, prints and draws."""
    parser = argparse.ArgumentParser(
        prog="python -m effarch.isoflop",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("csv", nargs="+", help="a header line, then a line for each run")
    default = ",".join(f"{name}={column}" for name, column in COLUMNS.items())
    parser.add_argument("--columns", default="", help=f"NAME=COLUMN,...; default: {default}")
    parser.add_argument(
        "--noise",
        type=float,
        help="standard deviation of the loss between seeds; default: that of the runs",
    )
    parser.add_argument(
        "--min_side", type=int, default=2, help="runs that an optimum needs on either side"
    )
    parser.add_argument(
        "--resamples", type=int, default=400, help="draws of the noise for the bands"
    )
    parser.add_argument("--figure", metavar="FILE", help="writes a PNG of the curves")
    flags = parser.parse_args(arguments)
    try:
        columns = COLUMNS | names.pairs(flags.columns, "--columns")
        found, noise = _optima(flags, columns)
        print(json.dumps(_content(found, noise), indent=1))
        if flags.figure:
            _draw(flags.figure, found, columns)
    except (ValueError, OSError) as error:
        parser.exit(2, f"{parser.prog}: {error}\n")


def _optima(
    flags: argparse.Namespace, columns: dict[str, str]
) -> tuple[dict[str, optima.Optima], float | None]:
    """Name -> optima of each file; the noise behind their bands, None without."""
    if flags.min_side < 1 or flags.resamples < 1:
        raise ValueError(
            f"--min_side={flags.min_side} and --resamples={flags.resamples} must be at least 1."
        )
    groups = {name: _read(path, columns) for name, path in _named(flags.csv)}
    options = {"min_side": flags.min_side, "resamples": flags.resamples}
    return optima.find(groups, flags.noise, **options)


def _named(paths: Sequence[str]) -> list[tuple[str, str]]:
    """(name, path) of each file: its folder's name where the files are all called the same."""
    files = [pathlib.Path(path).absolute() for path in paths]
    same = len({file.name for file in files}) == 1
    found = [file.parent.name if same else file.stem for file in files]
    if len(set(found)) < len(found):
        found = [str(path) for path in paths]
    if len(set(found)) < len(found):
        raise ValueError(f"{' '.join(paths)}: a file is named twice; give each once.")
    return list(zip(found, paths))


def _read(path: str, columns: dict[str, str]) -> dict[str, np.ndarray]:
    """The three columns of the runs that have all; FLOPs are those of their budgets."""
    names.refuse_unknown(columns, COLUMNS, "--columns")
    table = tables.read_csv(path)
    for column in columns.values():
        names.lookup(table, column, f"{path}: column")
    runs = {name: tables.numbers(table, column) for name, column in columns.items()}
    runs = tables.take(runs, np.all([np.isfinite(x) for x in runs.values()], axis=0))
    if not tables.num_rows(runs):
        raise ValueError(f"{path} holds no finished run; train some, then --collect the sweep.")
    return runs | {"flops": isoflop.same_budgets(runs["flops"])}


def _content(found: dict[str, optima.Optima], noise: float | None) -> dict:
    first = next(iter(found))
    return {
        "noise": noise,
        "architectures": {name: _one(each) for name, each in found.items()},
        f"flops_for_the_loss_over_{first}": {
            name: [vars(saving) for saving in optima.savings(found[first], each)]
            for name, each in found.items()
            if name != first
        },
    }


def _one(found: optima.Optima) -> dict:
    best, law = found.best, found.law()
    columns = ("flops", "size", "loss")
    content = {
        "budgets": [
            dict(zip(columns, map(float, row)))
            for row in zip(*(getattr(best, name) for name in columns))
        ],
        "budgets_without_an_optimum": list(best.dropped),
    }
    if law:
        content |= {"exponent": law.exponent, "coefficient": law.coefficient}
    if law and found.resampled:
        content["exponent_95"] = isoflop.exponent_band(found.resampled)
    return content


def _draw(path: str, found: dict[str, optima.Optima], columns: dict[str, str]) -> None:
    from effarch.scaling import isoflop_figure  # the plots' library takes a second to load

    isoflop_figure.draw(path, found, size=columns["size"], loss=columns["loss"])


if __name__ == "__main__":
    main()
