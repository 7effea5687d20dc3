"""IsoFLOP curves of a transformer and a hybrid: trains what is missing, then writes.

    python experiments/isoflop_cpu/run.py --layers transformer

Finished runs in --runs are kept, and so are the rows of results/runs.json, so that several machines can
share the work. Every run is written when it is finished: the smallest budget first, of each its middle
widths. A run goes on where the run of the same model on the budget before began its decay
(effarch/training/trunk.py), if its folder is there. A budget gets further widths until two lie on either
side of the lowest loss. Seeds after the first are for the middle width of every budget but the largest,
for the noise. --write_only trains nothing. Two processes may train an architecture each in one folder of
runs.
"""

import argparse
import functools
import itertools
import json
import math
import pathlib

import context
import filelock
import grid
import page

from effarch import experiment_runs

HERE = pathlib.Path(__file__).resolve().parent
CELL = ("layers", "width", "flops", "seed")


def main() -> None:
    flags = experiment_runs.parser(__doc__, runs="runs/isoflop_cpu", seeds=3)
    architectures = list(grid.LAYERS)
    flags.add_argument("--layers", nargs="+", choices=architectures, default=architectures)
    options = flags.parse_args()
    for flops in grid.BUDGETS:
        while missing := _missing(flops, options):
            at_once = len(missing) if options.write_only else options.parallel
            if not (rows := _finished(dict(itertools.islice(missing.items(), at_once)), options)):
                break
            _write(rows, options)
    _write([], options)


def _known() -> list[dict]:
    return json.loads(page.RESULTS.read_text())["runs"] if page.RESULTS.exists() else []


def _finished(cells: dict[str, dict], options: argparse.Namespace) -> list[dict]:
    """Trains what is missing of these cells; a row of each that is finished."""
    training = functools.partial(_flags, options)
    return [
        _row(cell, folder, summary)
        for cell, folder, summary in experiment_runs.finished(cells, training, options)
    ]


def _row(cell: dict, folder: pathlib.Path, summary: dict) -> dict:
    columns = {name: summary[name] for name in page.COLUMNS}
    return cell | columns | {"loss": summary["val/bits_per_byte"]} | context.measures(folder)


def _missing(flops: float, options: argparse.Namespace) -> dict[str, dict]:
    """Name -> cell of a budget's runs that have no row yet, the middle width first.

    Once all have one, those that put two widths on either side of each architecture's lowest loss.
    """
    rows = [row for row in _known() if row["flops"] == flops]
    names = {_name(**_cell(row)) for row in rows}
    planned = {layers: set(grid.BUDGETS[flops]) for layers in options.layers}
    further = {layers: _further(rows, layers, planned[layers]) for layers in options.layers}
    found = {}
    for widths in (planned, further):
        seeds = options.seeds if flops < max(grid.BUDGETS) else 1
        cells = {_name(**cell): cell for cell in _cells(flops, widths, seeds)}
        found = found or {name: cell for name, cell in cells.items() if name not in names}
    return found


def _cells(flops: float, widths: dict[str, set[int]], seeds: int) -> list[dict]:
    middle = grid.BUDGETS[flops][len(grid.BUDGETS[flops]) // 2]
    order = sorted(set.union(*widths.values()), key=lambda width: abs(math.log(width / middle)))
    return [
        {"layers": layers, "width": width, "flops": flops, "seed": seed}
        for seed in range(seeds)
        for width in ((middle,) if seed else order)
        for layers in widths
        if width in widths[layers]
    ]


def _further(rows: list[dict], layers: str, planned: set[int]) -> set[int]:
    """Widths within two places of the lowest loss, once all that were planned are finished."""
    losses = {r["width"]: r["loss"] for r in rows if r["layers"] == layers and not r["seed"]}
    if planned - losses.keys():
        return set()
    place = grid.WIDTHS.index(min(losses, key=losses.get))
    return set(grid.WIDTHS[max(place - 2, 0) : place + 3])


def _cell(row: dict) -> dict:
    return {field: row[field] for field in CELL}


def _name(layers: str, width: int, flops: float, seed: int) -> str:
    return f"{layers}-{width}-{flops:.0e}-seed{seed}"


def _flags(options: argparse.Namespace, seed: int, **cell) -> list[str]:
    """A cell's flags; its trunk is the finished run of the largest budget below."""
    given = experiment_runs.flags(HERE / "grid.py", seed, **cell)
    below = [
        options.runs / _name(**cell | {"flops": flops}, seed=seed)
        for flops in grid.BUDGETS
        if flops < cell["flops"] and not options.steps  # then all lengths are equal
    ]
    trunks = [folder for folder in below if experiment_runs.summary(folder)]
    return given + [f"--trunk={folder}" for folder in trunks[-1:]]


def _write(rows: list[dict], options: argparse.Namespace) -> None:
    """Adds rows to those that this and other processes wrote, and makes the pages anew."""
    options.runs.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(options.runs / ".results.lock"):
        merged = {_name(**_cell(row)): row for row in [*_known(), *rows]}
        if merged:
            order = ("flops", "width", "seed", "layers")
            page.write(sorted(merged.values(), key=lambda row: [row[field] for field in order]))


if __name__ == "__main__":
    main()
