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

import filelock
import grid
import numpy as np

from effarch import experiment_record, experiment_runs
from effarch.scaling import isoflop, isoflop_figure, optima, statistics, tables

HERE = pathlib.Path(__file__).resolve().parent
RESULTS = HERE / "results/runs.json"
CELL = ("layers", "width", "flops", "seed")
NOISE = 0.005
"""Bits per byte between seeds, where there are none to tell."""
SIZES = {"params_matmul": "with the head", "params_non_embedding": "without"}
COLUMNS = (*SIZES, "tokens", "flops_model", "flops_6nd", "steps", "seconds")


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
    return json.loads(RESULTS.read_text())["runs"] if RESULTS.exists() else []


def _finished(cells: dict[str, dict], options: argparse.Namespace) -> list[dict]:
    """Trains what is missing of these cells; a row of each that is finished."""
    training = functools.partial(_flags, options)
    return [
        cell | {name: summary[name] for name in COLUMNS} | {"loss": summary["val/bits_per_byte"]}
        for cell, _, summary in experiment_runs.finished(cells, training, options)
    ]


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


def _optima(found: list[dict], size: str) -> tuple[dict[str, optima.Optima], float]:
    """Architecture -> its optima where `size` counts the parameters; the noise between seeds."""
    groups = {}
    for layers in grid.LAYERS:
        if rows := [row for row in found if row["layers"] == layers]:
            columns = {x: np.array([row[x] for row in rows]) for x in ("flops", "loss", *COLUMNS)}
            groups[layers] = columns | {"size": columns[size]}
    several = any(row["seed"] for row in found)
    return optima.find(groups, None if several else NOISE)


def _at_optimum(found: optima.Optima, name: str) -> np.ndarray:
    """A column at N* of each budget, between its runs in logarithms [budgets]."""
    values = []
    for flops, size in zip(found.best.flops, found.best.size):
        rows = tables.where(found.runs, flops=flops)
        order = np.argsort(rows["size"])
        sizes, column = (np.log(rows[x][order]) for x in ("size", name))
        values.append(np.exp(np.interp(np.log(size), sizes, column)))
    return np.array(values)


def _exponents(best: dict[str, dict[str, optima.Optima]]) -> dict[str, dict[str, list[float]]]:
    """Architecture -> what N and C count -> a of N* = k C^a, with its band where it has one.

    `best`: what N counts -> architecture -> its optima.
    """
    exponents = {layers: {} for layers in grid.LAYERS}
    for size, text in SIZES.items():
        for layers, each in best[size].items():
            if law := each.law():
                band = isoflop.exponent_band(each.resampled)
                exponents[layers][f"N {text}, C of the model"] = [law.exponent, *band]
    for layers, each in best["params_matmul"].items():
        if each.law():
            law = isoflop.power_law(_at_optimum(each, "flops_6nd"), each.best.size)
            exponents[layers]["N with the head, C = 6 N D"] = [law.exponent]
    return exponents


def _write(rows: list[dict], options: argparse.Namespace) -> None:
    """Adds rows to those that this and other processes wrote, and makes the pages anew."""
    options.runs.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(options.runs / ".results.lock"):
        merged = {_name(**_cell(row)): row for row in [*_known(), *rows]}
        if merged:
            order = ("flops", "width", "seed", "layers")
            _make(sorted(merged.values(), key=lambda row: [row[field] for field in order]))


def _make(found: list[dict]) -> None:
    readme = HERE / "README.md"
    counted = {size: _optima(found, size) for size in SIZES}
    exponents = _exponents({size: each for size, (each, _) in counted.items()})
    best, noise = counted["params_matmul"]
    results = {"noise": noise, "exponents": exponents, "runs": found}
    experiment_record.write_json(RESULTS, results)
    header = ["FLOPs", "width", "N", *grid.LAYERS, "hybrid - transformer"]
    experiment_record.write_table(readme, "losses", header, _loss_rows(found))
    header = ["FLOPs", "architecture", "N*", "D*", "D* / N*", "bits per byte at N*"]
    rows = [row for layers, each in best.items() for row in _vertex_rows(layers, each)]
    experiment_record.write_table(readme, "vertices", header, rows)
    experiment_record.write_text(readme, "verdict", _verdict(found, best, exponents, noise))
    axes = {"size": "parameters with the head", "loss": "bits per byte, held out"}
    isoflop_figure.draw(HERE / "figures/isoflop.png", best, **axes)


def _loss_rows(found: list[dict]) -> list[list[str]]:
    rows = []
    for flops, width in sorted({(row["flops"], row["width"]) for row in found}):
        cell = {"flops": flops, "width": width}
        losses = [experiment_runs.figures(found, "loss", layers=x, **cell) for x in grid.LAYERS]
        pairs = experiment_runs.paired(found, "loss", *({"layers": x, **cell} for x in grid.LAYERS))
        size = next(row["params_matmul"] for row in found if cell.items() <= row.items())
        gap = f"{np.mean(pairs[1] - pairs[0]):+.4f}" if len(pairs[0]) else ""
        shown = [experiment_record.ranged(values) if len(values) else "" for values in losses]
        rows.append([f"{flops:.0e}", width, f"{size / 1e6:.2f}M", *shown, gap])
    return rows


def _vertex_rows(layers: str, found: optima.Optima) -> list[list[str]]:
    best = found.best
    rows = [
        [f"{c:.0e}", layers, f"{n / 1e6:.2f}M", f"{d / 1e6:.1f}M", f"{d / n:.0f}", f"{loss:.4f}"]
        for c, n, d, loss in zip(best.flops, best.size, _at_optimum(found, "tokens"), best.loss)
    ]
    return rows + [[f"{flops:.0e}", layers, "not inside", *[""] * 3] for flops in best.dropped]


def _verdict(found: list[dict], best: dict, exponents: dict, noise: float) -> str:
    pairs = [[], []]
    for flops, width in sorted({(row["flops"], row["width"]) for row in found}):
        cells = ({"layers": x, "flops": flops, "width": width} for x in grid.LAYERS)
        for side, values in zip(pairs, experiment_runs.paired(found, "loss", *cells)):
            side.extend(values)
    sentences = [f"{experiment_record.effort(found)} **Verdict.**"]
    for layers, laws in exponents.items():
        shown = [
            f"{a:.2f}" + (f" ({band[0]:.2f} to {band[1]:.2f})" if band else "") + f" for {name}"
            for name, (a, *band) in laws.items()
        ]
        sentences.append(
            f"N* of the {layers} grows as C^a, a = {', '.join(shown)}."
            if shown
            else f"No exponent of the {layers} yet: it needs two budgets with an optimum inside."
        )
    if len(pairs[0]) > 1:
        told = statistics.verdict(*map(np.array, pairs), names=tuple(grid.LAYERS))
        sentences.append(f"At equal FLOPs and sizes, in bits per byte: {told}.")
    if len(best) > 1:
        sentences += _at_best(*(best[layers] for layers in grid.LAYERS))
    return " ".join(sentences) + f" Bands are 95 %, for {noise:.4f} bits per byte between seeds."


def _at_best(transformer: optima.Optima, hybrid: optima.Optima) -> list[str]:
    """The difference at equal FLOPs, each at its best size; the FLOPs for equal losses."""
    budgets, rows, others = np.intersect1d(
        transformer.best.flops, hybrid.best.flops, return_indices=True
    )
    gaps = hybrid.best.loss[others] - transformer.best.loss[rows]
    shown = ", ".join(f"{gap:+.4f} with {flops:.0e}" for flops, gap in zip(budgets, gaps))
    found = [f"Each at its best size, the hybrid less the transformer: {shown}."] if shown else []
    ratios = [
        f"{x.ratio:.2f} ({x.band[0]:.2f} to {x.band[1]:.2f}) at its loss with {x.flops:.0e}"
        for x in optima.savings(hybrid, transformer)
    ]
    if ratios:
        found.append(
            f"The transformer needs so many times the hybrid's FLOPs: {', '.join(ratios)}."
        )
    return found


if __name__ == "__main__":
    main()
