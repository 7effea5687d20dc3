"""IsoFLOP curves of a transformer and a hybrid: trains what is missing, then writes.

    python experiments/isoflop_cpu/run.py --layers transformer

Finished runs in --runs are kept, and so are the rows of results/runs.json, so that several machines can
share the work. Every run is written when it is finished: the smallest budget first, of each its middle
widths. A run goes on where the run of the same model on the budget before began its decay
(effarch/training/trunk.py), if its folder is there. A budget gets further widths until two lie on either
side of the lowest loss. Seeds after the first are for the middle width of the smallest budget, for the
noise. --write_only trains nothing. Two processes may train an architecture each in one folder of runs.
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
from effarch.scaling import isoflop, multiplier, statistics, tables

HERE = pathlib.Path(__file__).resolve().parent
RESULTS = HERE / "results/runs.json"
CELL = ("layers", "width", "flops", "seed")
NOISE = 0.005
"""Bits per byte between seeds, where there are none to tell."""
RESAMPLES = 400
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
        seeds = options.seeds if flops == min(grid.BUDGETS) else 1
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


def _means(found: list[dict], layers: str) -> tables.Table:
    """Every width at every budget: its columns, and the loss as mean over seeds."""
    rows = [row for row in found if row["layers"] == layers]
    cells = dict.fromkeys((row["flops"], row["width"]) for row in rows)
    means = [
        {
            name: np.mean([r[name] for r in rows if (r["flops"], r["width"]) == cell])
            for name in ("flops", "loss", *COLUMNS)
        }
        for cell in cells
    ]
    return {name: np.array([row[name] for row in means]) for name in ("flops", "loss", *COLUMNS)}


def _noise(found: list[dict]) -> float:
    """The standard deviation between seeds, pooled over the cells that have several."""
    cells: dict[tuple, list[float]] = {}
    for row in found:
        cells.setdefault((row["layers"], row["width"], row["flops"]), []).append(row["loss"])
    variances = [np.var(losses, ddof=1) for losses in cells.values() if len(losses) > 1]
    return float(np.sqrt(np.mean(variances))) if variances else NOISE


def _at_optimum(runs: tables.Table, best: isoflop.Vertices, name: str) -> np.ndarray:
    """A column at N* of each budget, between its runs in logarithms [budgets]."""
    found = []
    for flops, size in zip(best.flops, best.size):
        rows = tables.where(runs, flops=flops)
        order = np.argsort(rows["params_matmul"])
        sizes, values = (np.log(rows[column][order]) for column in ("params_matmul", name))
        found.append(np.exp(np.interp(np.log(size), sizes, values)))
    return np.array(found)


def _exponents(runs: tables.Table, noise: float) -> dict[str, list[float]]:
    """What N counts and what C -> the exponent of N* = k C^a, with its band where it has one."""
    found = {}
    for name, text in SIZES.items():
        columns = (runs["flops"], runs[name], runs["loss"])
        best = isoflop.vertices(*columns)
        if len(best.flops) < 2:
            return {}
        band = isoflop.exponent_band(
            *columns, lambda losses: np.full(len(losses), noise), resamples=RESAMPLES
        )
        law = isoflop.power_law(best.flops, best.size)
        found[f"N {text}, C of the model"] = [law.exponent, *band]
    best = isoflop.vertices(runs["flops"], runs["params_matmul"], runs["loss"])
    law = isoflop.power_law(_at_optimum(runs, best, "flops_6nd"), best.size)
    found["N with the head, C = 6 N D"] = [law.exponent]
    return found


def _write(rows: list[dict], options: argparse.Namespace) -> None:
    """Adds rows to those that this and other processes wrote, and makes the pages anew."""
    options.runs.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(options.runs / ".results.lock"):
        merged = {_name(**_cell(row)): row for row in [*_known(), *rows]}
        if merged:
            order = ("flops", "width", "seed", "layers")
            _make(sorted(merged.values(), key=lambda row: [row[field] for field in order]))


def _make(found: list[dict]) -> None:
    noise, readme = _noise(found), HERE / "README.md"
    runs = {layers: _means(found, layers) for layers in grid.LAYERS}
    runs = {layers: table for layers, table in runs.items() if tables.num_rows(table)}
    best = {
        layers: isoflop.vertices(table["flops"], table["params_matmul"], table["loss"])
        for layers, table in runs.items()
    }
    exponents = {layers: _exponents(table, noise) for layers, table in runs.items()}
    results = {"noise": noise, "exponents": exponents, "runs": found}
    experiment_record.write_json(RESULTS, results)
    header = ["FLOPs", "width", "N", *grid.LAYERS, "hybrid - transformer"]
    experiment_record.write_table(readme, "losses", header, _loss_rows(found, runs))
    header = ["FLOPs", "architecture", "N*", "D*", "D* / N*", "bits per byte at N*"]
    rows = [row for layers in runs for row in _vertex_rows(layers, runs[layers], best[layers])]
    experiment_record.write_table(readme, "vertices", header, rows)
    experiment_record.write_text(readme, "verdict", _verdict(found, runs, best, exponents, noise))
    _draw(runs, best)


def _loss_rows(found: list[dict], runs: dict[str, tables.Table]) -> list[list[str]]:
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


def _vertex_rows(layers: str, runs: tables.Table, best: isoflop.Vertices) -> list[list[str]]:
    tokens = _at_optimum(runs, best, "tokens")
    rows = [
        [f"{c:.0e}", layers, f"{n / 1e6:.2f}M", f"{d / 1e6:.1f}M", f"{d / n:.0f}", f"{loss:.4f}"]
        for c, n, d, loss in zip(best.flops, best.size, tokens, best.loss)
    ]
    return rows + [[f"{flops:.0e}", layers, "not inside", *[""] * 3] for flops in best.dropped]


def _multipliers(runs: dict[str, tables.Table], best: dict, noise: float) -> list[str]:
    """Where both architectures have enough budgets: the FLOPs for each loss of the transformer's."""
    if len(best) < 2 or min(len(x.flops) for x in best.values()) < multiplier.LEAST:
        return []
    first, second = best["hybrid"], best["transformer"]
    samples = [
        isoflop.resampled(
            *(runs[layers][name] for name in ("flops", "params_matmul", "loss")),
            lambda losses: np.full(len(losses), noise),
            resamples=RESAMPLES,
            seed=seed,
        )
        for seed, layers in enumerate(("hybrid", "transformer"))
    ]
    found = []
    for flops, loss in zip(second.flops, second.loss):
        if first.loss.min() <= loss <= first.loss.max():
            ratio = multiplier.compute_multiplier(first, second, loss)
            low, high = multiplier.band(*samples, loss)
            found.append(f"{ratio:.2f} ({low:.2f} to {high:.2f}) at its loss with {flops:.0e}")
    return [f"The transformer needs so many times the hybrid's FLOPs: {', '.join(found)}."]


def _verdict(found: list[dict], runs: dict, best: dict, exponents: dict, noise: float) -> str:
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
    both = set.intersection(*(set(x.flops) for x in best.values())) if len(best) > 1 else set()
    for flops in sorted(both):
        first, second = (float(x.loss[x.flops == flops][0]) for x in best.values())
        gap = second - first
        sentences.append(f"Each at its best size for {flops:.0e} FLOPs: hybrid {gap:+.4f}.")
    sentences += _multipliers(runs, best, noise)
    return " ".join(sentences) + f" Bands are 95 %, for {noise:.4f} bits per byte between seeds."


def _draw(runs: dict[str, tables.Table], best: dict[str, isoflop.Vertices]) -> None:
    styles = {"transformer": ("o", "-"), "hybrid": ("s", "--")}
    with experiment_record.panels(HERE / "figures/isoflop.png", 2, size=(10, 4)) as (left, right):
        for layers, table in runs.items():
            marker, line = styles[layers]
            for index, flops in enumerate(grid.BUDGETS):
                rows = tables.where(table, flops=flops)
                if not tables.num_rows(rows):
                    continue
                label = f"{layers}, {flops:.0e} FLOPs"
                style = dict(color=f"C{index}", marker=marker, ms=4, ls="", mfc="none")
                left.plot(rows["params_matmul"], rows["loss"], label=label, **style)
            found = best[layers]
            for flops, size, loss, curvature in zip(
                found.flops, found.size, found.loss, found.curvature
            ):
                across = np.geomspace(size / 4, size * 4, 60)
                color = f"C{list(grid.BUDGETS).index(flops)}"
                curve = loss + curvature * np.log(across / size) ** 2
                left.plot(across, curve, color=color, ls=line, lw=1)
            right.plot(found.flops, found.size, marker, color="C3", mfc="none", label=layers)
            if len(found.flops) > 1:
                law = isoflop.power_law(found.flops, found.size)
                label = f"{layers}: a = {law.exponent:.2f}"
                right.plot(found.flops, law(found.flops), color="C3", ls=line, lw=1, label=label)
        left.set(xlabel="parameters with the head", ylabel="bits per byte, held out", xscale="log")
        left.legend(frameon=False, fontsize=7)
        right.set(xlabel="training FLOPs", ylabel="best size N*")
        if any(len(found.flops) for found in best.values()):
            right.set(xscale="log", yscale="log")
            right.legend(frameon=False, fontsize=8)


if __name__ == "__main__":
    main()
