"""Sweeps the learning rate in both parametrizations and writes the tables and figure of the README."""

import argparse
import csv
import pathlib
import subprocess
import sys

import numpy as np

from effarch import experiment_record

HERE = pathlib.Path(__file__).resolve().parent
KINDS = ("standard", "mup")
Curves = dict[int, list[tuple[float, float]]]
"""Width -> (log2 learning rate, validation loss), by rate."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=pathlib.Path, default=pathlib.Path("runs"))
    parser.add_argument("--out", type=pathlib.Path, default=HERE)
    parser.add_argument("--switches", default="widths=64+128+256", help="of grid.py, without kind")
    parser.add_argument("--parallel", type=int, default=1)
    flags = parser.parse_args()
    curves = {kind: _sweep(kind, flags) for kind in KINDS}
    best = {kind: {width: optimum(c) for width, c in curves[kind].items()} for kind in KINDS}
    results = {
        kind: {
            str(width): {
                "log2_best_rate": best[kind][width][0],
                "best_loss": best[kind][width][1],
                "losses": {f"{rate:g}": loss for rate, loss in points},
            }
            for width, points in curves[kind].items()
        }
        for kind in KINDS
    }
    experiment_record.write_json(flags.out / "results/rates.json", results)
    _draw(curves, flags.out / "figures/rates.png")
    _write_tables(best, flags.out / "README.md")


def _sweep(kind: str, flags: argparse.Namespace) -> Curves:
    """Runs what is missing and reads results.csv."""
    folder = flags.runs / f"mup-transfer-{kind}"
    config = f"--config={HERE / 'grid.py'}:kind={kind},{flags.switches}"
    command = [sys.executable, "-m", "effarch.sweep", config, f"--workdir={folder}"]
    code = subprocess.run([*command, f"--parallel={flags.parallel}"]).returncode
    if code not in (0, 1):  # 1: some diverged, which is a result
        raise SystemExit(code)
    curves: Curves = {}
    with (folder / "results.csv").open() as file:
        for row in csv.DictReader(file):
            rate = float(np.log2(float(row["optimizer.learning_rate"])))
            loss = float(row["val/loss"]) if row.get("val/loss") else float("inf")
            curves.setdefault(int(row["model.width"]), []).append((rate, loss))
    return {width: sorted(points) for width, points in sorted(curves.items())}


def optimum(points: list[tuple[float, float]]) -> tuple[float, float]:
    """The vertex of the parabola through the best rate and its neighbours; at an end, the end."""
    rates, losses = (np.array(column) for column in zip(*points))
    best = int(np.argmin(losses))
    if 0 < best < len(rates) - 1 and np.isfinite(losses[best - 1 : best + 2]).all():
        curve = np.polyfit(rates[best - 1 : best + 2], losses[best - 1 : best + 2], 2)
        vertex = -curve[1] / (2 * curve[0])
        return float(vertex), float(np.polyval(curve, vertex))
    return float(rates[best]), float(losses[best])


def _draw(curves: dict[str, Curves], path: pathlib.Path) -> None:
    with experiment_record.panels(path, 2, size=(9, 3.6), sharey=True) as panels:
        for panel, kind in zip(panels, KINDS):
            for width, points in curves[kind].items():
                panel.plot(*zip(*points), "o-", ms=3, label=f"width {width}")
            panel.set(title=kind, xlabel="log2 learning rate")
        lowest = min(loss for c in curves.values() for points in c.values() for _, loss in points)
        panels[0].set(ylabel="validation loss, nats a byte", ylim=(lowest - 0.05, lowest + 1.0))
        panels[0].legend(frameon=False)


def _write_tables(best: dict, readme: pathlib.Path) -> None:
    widths = list(best["mup"])
    rows = [
        [kind, *(f"{best[kind][w][0]:.2f} ({best[kind][w][1]:.3f})" for w in widths)]
        for kind in KINDS
    ]
    header = ["parametrization", *(f"width {width}" for width in widths)]
    experiment_record.write_table(readme, "rates", header, rows)
    moved = {kind: best[kind][widths[-1]][0] - best[kind][widths[0]][0] for kind in KINDS}
    holds = abs(moved["mup"]) <= 1
    text = (
        f"**Verdict.** From width {widths[0]} to {widths[-1]} the best rate moves by "
        f"{moved['mup']:+.2f} octaves in muP and by {moved['standard']:+.2f} in the standard "
        f"parametrization; muP {'keeps' if holds else 'does not keep'} it within one octave. At width "
        f"{widths[-1]} the best of muP is {best['mup'][widths[-1]][1]:.3f} and that of the standard "
        f"parametrization {best['standard'][widths[-1]][1]:.3f}: a rate that transfers is not "
        "necessarily the lowest loss that so few steps reach."
    )
    experiment_record.write_text(readme, "verdict", text)


if __name__ == "__main__":
    main()
