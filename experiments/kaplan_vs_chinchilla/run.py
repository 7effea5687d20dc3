"""The exponent of the optimal size, from Kaplan's setting to Chinchilla's, on Porian's runs.

python experiments/kaplan_vs_chinchilla/run.py

Writes results/exponents.json, figures/exponents.png and the table of README.md. A minute on one core.
"""

import pathlib

import numpy as np

from effarch import experiment_record
from effarch.scaling import isoflop, tables

HERE = pathlib.Path(__file__).resolve().parent
STEPS = {
    "Kaplan's setting: no head in N and C, long warmup, training loss": dict(
        file="summary_df", hparams="base", warmup="long", decay="kaplan", param_count="kaplan"
    ),
    "head counted, validation loss": dict(
        file="summary_df", hparams="base", warmup="long", decay="kaplan", param_count="standard"
    ),
    "warmup in proportion to N": dict(
        file="summary_df", hparams="base", warmup="short", decay="kaplan", param_count="standard"
    ),
    "cosine as long as the budget": dict(
        file="summary_df",
        hparams="base",
        warmup="short",
        decay="chinchilla",
        param_count="standard",
    ),
    "lr, batch and beta2 tuned for each size, constant lr": dict(
        file="summary_df", hparams="tuned", warmup="short", decay="const", param_count="standard"
    ),
    "the same with exact attention FLOPs": dict(
        file="summary_df_att",
        hparams="tuned",
        warmup="short",
        decay="const",
        param_count="attention",
    ),
}


def noise(losses: np.ndarray) -> np.ndarray:
    """Porian's standard deviation between seeds on RefinedWeb: 0.002 at L = 3 to 0.05 at L = 7."""
    return np.exp(np.interp(losses, (3, 7), np.log((0.002, 0.05))))


def main() -> None:
    points = tables.read_csv(HERE / "data/porian_isoflop_points.csv")
    fits = tables.read_csv(HERE / "data/porian_published_fits.csv")
    results = {name: _step(points, fits, step) for name, step in STEPS.items()}
    optima = tables.read_csv(HERE / "data/porian_isoflop_optima.csv")
    tuned = tables.where(optima, file="summary_df", dataset="rw", hparams="tuned")
    law = isoflop.power_law(tuned["flops"], tuned["n_star"], tuned["n_star_log_std"] ** -2.0)
    content = {"steps": results, "published_optima": vars(law)}
    experiment_record.write_json(HERE / "results/exponents.json", content)
    _write_table(results)
    _draw(points, results)


def _step(points: tables.Table, fits: tables.Table, step: dict[str, str]) -> dict[str, float]:
    runs = tables.where(points, dataset="rw", **step)
    published = tables.where(fits, dataset="rw", **step)
    columns = (runs["flops"], runs["n"], runs["loss"])
    found = isoflop.vertices(*columns, min_side=1)
    parabola = isoflop.power_law(found.flops, found.size)
    resamples = isoflop.resampled(*columns, noise, min_side=1, resamples=500)
    low, high = isoflop.exponent_band(resamples)
    strict = isoflop.vertices(*columns, min_side=2)
    akima, budgets = _akima(*columns)
    return {
        "published": float(published["n_exponent"][0]),
        "published_low": float(published["n_exp_lo"][0]),
        "published_high": float(published["n_exp_hi"][0]),
        "parabola": parabola.exponent,
        "parabola_coefficient": parabola.coefficient,
        "parabola_low": low,
        "parabola_high": high,
        "budgets": len(found.flops),
        "budgets_dropped": len(found.dropped),
        "two_runs_on_each_side": isoflop.power_law(strict.flops, strict.size).exponent,
        "akima": akima,
        "akima_budgets": budgets,
    }


def _akima(flops: np.ndarray, sizes: np.ndarray, losses: np.ndarray) -> tuple[float, int]:
    """Porian's own procedure: the exponent, weighted by 1 / variance, and how many budgets it kept."""
    rows = []
    for budget in np.unique(flops):
        at = flops == budget
        optimum = isoflop.akima_optimum(sizes[at], losses[at], noise)
        if optimum is not None:
            rows.append((budget, *optimum))
    kept, size, spread = np.array(rows).T
    return isoflop.power_law(kept, size, spread**-2.0).exponent, len(rows)


def _write_table(results: dict) -> None:
    rows = [
        [
            name,
            f"{r['published']:.3f} ({r['published_low']:.3f} to {r['published_high']:.3f})",
            f"{r['akima']:.3f}",
            f"{r['parabola']:.3f} ({r['parabola_low']:.3f} to {r['parabola_high']:.3f})",
            f"{r['two_runs_on_each_side']:.3f}",
            f"{r['budgets']} of {r['budgets'] + r['budgets_dropped']}",
        ]
        for name, r in results.items()
    ]
    header = [
        "step (each adds to the one above)",
        "published",
        "their method",
        "parabola",
        "parabola, 2 runs a side",
        "budgets",
    ]
    experiment_record.write_table(HERE / "README.md", "exponents", header, rows)


def _draw(points: tables.Table, results: dict) -> None:
    path = HERE / "figures/exponents.png"
    with experiment_record.panels(path, 2, size=(10, 4), width_ratios=(3, 2)) as (left, right):
        steps = list(STEPS.items())
        for label, (_, step) in (("Kaplan's setting", steps[0]), ("tuned, constant lr", steps[4])):
            runs = tables.where(points, dataset="rw", **step)
            found = isoflop.vertices(runs["flops"], runs["n"], runs["loss"], min_side=1)
            law = isoflop.power_law(found.flops, found.size)
            shown = left.plot(found.flops, found.size, "o", ms=4)
            label = f"{label}: a = {law.exponent:.2f}"
            left.plot(found.flops, law(found.flops), color=shown[0].get_color(), label=label)
        left.set(xlabel="training FLOPs", ylabel="optimal parameters", xscale="log", yscale="log")
        left.legend(frameon=False, fontsize=8)
        rows = np.arange(len(results))
        middle = np.array([r["parabola"] for r in results.values()])
        ends = np.array([(r["parabola_low"], r["parabola_high"]) for r in results.values()]).T
        errors = np.maximum(np.abs(ends - middle), 0)
        right.errorbar(middle, rows, xerr=errors, fmt="o", ms=4, label="parabola")
        right.plot([r["published"] for r in results.values()], rows, "x", label="published")
        right.set_yticks(rows, [f"step {row + 1}" for row in rows])
        right.invert_yaxis()
        right.axvline(0.5, color="0.6", lw=0.8, ls="--")
        right.set(xlabel="exponent a of N* = k C^a")
        right.legend(frameon=False)


if __name__ == "__main__":
    main()
