"""The results of the runs: tables, exponents, a verdict and pictures in this folder's README."""

import pathlib

import context
import grid
import numpy as np

from effarch import experiment_record, experiment_runs
from effarch.scaling import isoflop, isoflop_figure, optima, statistics, tables

HERE = pathlib.Path(__file__).resolve().parent
RESULTS = HERE / "results/runs.json"
NOISE = 0.005
"""Bits per byte between seeds, where there are none to tell."""
SIZES = {"params_matmul": "with the head", "params_non_embedding": "without"}
COLUMNS = (*SIZES, "tokens", "flops_model", "flops_6nd", "steps", "seconds")
"""Of a run's summary."""
LOSSES = {"loss": f"windows of {grid.SEQ_LEN}", "loss_32": f"windows of {context.WINDOW}"}
"""Bits per byte of the held-out text: column -> the bytes that a model sees at once."""


def write(found: list[dict]) -> None:
    """Makes results/runs.json, the README's tables and the pictures of these rows."""
    readme = HERE / "README.md"
    best = {loss: _optima(found, "params_matmul", loss) for loss in LOSSES}
    exponents = {loss: _exponents(found, loss) for loss in LOSSES}
    noise = {loss: level for loss, (_, level) in best.items()}
    results = {"noise": noise, "exponents": exponents, "runs": found}
    experiment_record.write_json(RESULTS, results)
    header = ["FLOPs", "width", "N", *grid.LAYERS, "hybrid - transformer"]
    header += [f"{layers}, {context.WINDOW}" for layers in grid.LAYERS]
    header += [f"{layers} copies" for layers in grid.LAYERS]
    experiment_record.write_table(readme, "losses", header, _loss_rows(found))
    header = ["bits per byte in", "FLOPs", "architecture", "N*", "D*", "D* / N*", "lowest"]
    rows = [
        [LOSSES[loss], *row]
        for loss, (architectures, _) in best.items()
        for layers, each in architectures.items()
        for row in _vertex_rows(layers, each)
    ]
    experiment_record.write_table(readme, "vertices", header, rows)
    experiment_record.write_text(readme, "verdict", _verdict(found, best, exponents))
    for loss, (architectures, _) in best.items():
        axes = {"size": "parameters with the head", "loss": f"bits per byte, {LOSSES[loss]}"}
        isoflop_figure.draw(HERE / f"figures/{loss}.png", architectures, **axes)


def _optima(found: list[dict], size: str, loss: str) -> tuple[dict[str, optima.Optima], float]:
    """Architecture -> its optima where `size` counts the parameters; the noise between seeds."""
    groups = {}
    for layers in grid.LAYERS:
        if rows := [row for row in found if row["layers"] == layers]:
            columns = {x: np.array([row[x] for row in rows]) for x in ("flops", *COLUMNS)}
            columns["loss"] = np.array([row[loss] for row in rows])
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


def _exponents(found: list[dict], loss: str) -> dict[str, dict[str, list[float]]]:
    """Architecture -> what N and C count -> a of N* = k C^a, with its band where it has one."""
    exponents = {layers: {} for layers in grid.LAYERS}
    for size, text in SIZES.items():
        best, _ = _optima(found, size, loss)
        for layers, each in best.items():
            if law := each.law():
                band = isoflop.exponent_band(each.resampled)
                exponents[layers][f"N {text}, C of the model"] = [law.exponent, *band]
            if law and size == "params_matmul":
                law = isoflop.power_law(_at_optimum(each, "flops_6nd"), each.best.size)
                exponents[layers]["N with the head, C = 6 N D"] = [law.exponent]
    return exponents


def _loss_rows(found: list[dict]) -> list[list[str]]:
    rows = []
    for flops, width in sorted({(row["flops"], row["width"]) for row in found}):
        cells = [{"layers": layers, "flops": flops, "width": width} for layers in grid.LAYERS]
        pairs = experiment_runs.paired(found, "loss", *cells)
        size = next(r["params_matmul"] for r in found if (r["flops"], r["width"]) == (flops, width))
        gap = f"{np.mean(pairs[1] - pairs[0]):+.4f}" if len(pairs[0]) else ""
        loss, short, copying = (
            [experiment_runs.figures(found, name, **cell) for cell in cells]
            for name in (*LOSSES, "copying")
        )
        shown = [experiment_record.ranged(values) if len(values) else "" for values in loss]
        rest = [f"{np.mean(x):.3f}" if len(x) else "" for x in short]
        rest += [" ".join(f"{value:.1f}" for value in x) for x in copying]
        rows.append([f"{flops:.0e}", width, f"{size / 1e6:.2f}M", *shown, gap, *rest])
    return rows


def _vertex_rows(layers: str, found: optima.Optima) -> list[list[str]]:
    best = found.best
    rows = [
        [f"{c:.0e}", layers, f"{n / 1e6:.2f}M", f"{d / 1e6:.1f}M", f"{d / n:.0f}", f"{loss:.4f}"]
        for c, n, d, loss in zip(best.flops, best.size, _at_optimum(found, "tokens"), best.loss)
    ]
    return rows + [[f"{flops:.0e}", layers, "not inside", *[""] * 3] for flops in best.dropped]


def _verdict(found: list[dict], best: dict, exponents: dict) -> str:
    """`best`: loss -> (architecture -> optima, noise); `exponents`: loss -> `_exponents`."""
    sentences = [f"{experiment_record.effort(found)} **Verdict.**"]
    for loss, (architectures, noise) in best.items():
        sentences.append(f"In {LOSSES[loss]}:")
        sentences += [_growth(layers, laws) for layers, laws in exponents[loss].items()]
        pairs = _all_pairs(found, loss)
        if len(pairs[0]) > 1:
            told = statistics.verdict(*pairs, names=tuple(grid.LAYERS))
            sentences.append(f"At equal FLOPs and sizes, in bits per byte: {told}.")
        if len(architectures) > 1:
            sentences += _at_best(*(architectures[layers] for layers in grid.LAYERS))
        sentences.append(f"Bands are 95 %, for {noise:.4f} bits per byte between seeds.\n\n")
    return " ".join(sentences).replace("\n\n ", "\n\n").rstrip()


def _growth(layers: str, laws: dict[str, list[float]]) -> str:
    shown = [
        f"{a:.2f}" + (f" ({band[0]:.2f} to {band[1]:.2f})" if band else "") + f" for {name}"
        for name, (a, *band) in laws.items()
    ]
    if not shown:
        return f"No exponent of the {layers}: it needs two budgets with an optimum inside."
    return f"N* of the {layers} grows as C^a, a = {', '.join(shown)}."


def _all_pairs(found: list[dict], loss: str) -> tuple[np.ndarray, np.ndarray]:
    pairs = [[], []]
    for flops, width in sorted({(row["flops"], row["width"]) for row in found}):
        cells = ({"layers": x, "flops": flops, "width": width} for x in grid.LAYERS)
        for side, values in zip(pairs, experiment_runs.paired(found, loss, *cells)):
            side.extend(values)
    return tuple(np.array(side) for side in pairs)


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
