"""Does a law fitted on small, over-trained runs predict large ones? Gadre's testbed.

python experiments/overtraining/run.py

Writes results/predictions.json, figures/overtraining.png and the tables of README.md. Seconds.
"""

import pathlib

import matplotlib
import numpy as np
import scipy.optimize

from effarch import experiment_record
from effarch.scaling import fits, laws, tables

HERE = pathlib.Path(__file__).resolve().parent
OPTIONS = fits.Options(delta=None, residual="linear")
TRAIN_SETS = {"c4_original": "C4", "rpj": "RedPajama", "rw_original": "RefinedWeb"}
TOKENS_PER_PARAM = 20  # at chinchilla_mult = 1
SMALL, SMALLEST = 1e9, 2e7


def main() -> None:
    everything = tables.read_csv(HERE / "data/gadre_overtraining_testbed.csv")
    everything["loss"] = everything["loss_c4_val"]
    accuracies = [column for name, column in everything.items() if name.startswith("acc_")]
    everything["error"] = 1 - np.mean(accuracies, axis=0)
    results = {name: _train_set(everything, key) for key, name in TRAIN_SETS.items()}
    experiment_record.write_json(HERE / "results/predictions.json", results)
    _write_tables(results)
    _draw(everything)


def _fitted_rows(runs: tables.Table) -> np.ndarray:
    """The five runs of the paper: M = 20 for the four small sizes, M = 320 for the smallest."""
    ratio = runs["chinchilla_mult"]
    over_trained = (ratio == 16) & (runs["params"] < SMALLEST)
    return (runs["params"] < SMALL) & ((ratio == 1) | over_trained)


def _train_set(everything: tables.Table, key: str) -> dict:
    runs = tables.where(everything, train_set=key)
    rows = _fitted_rows(runs)
    found = fits.fit(laws.GADRE, tables.take(runs, rows), OPTIONS, num_starts=64)
    predicted = found.predict(runs)
    percent = 100 * np.abs(predicted / runs["loss"] - 1)
    large = np.flatnonzero(runs["params"] > SMALL)
    rest = ~rows & (runs["params"] < SMALL)
    return {
        "params": found.params,
        "starts_agreeing": [found.num_agreeing, found.num_starts],
        "small_runs_not_fitted": int(rest.sum()),
        "their_mean_error_percent": float(percent[rest].mean()),
        "large": [
            {
                "params": float(runs["params"][row]),
                "tokens_per_param": TOKENS_PER_PARAM * float(runs["chinchilla_mult"][row]),
                "measured": float(runs["loss"][row]),
                "predicted": float(predicted[row]),
                "error_percent": float(percent[row]),
            }
            for row in large
        ],
        "downstream": _downstream(runs, rows, predicted),
    }


def _downstream(runs: tables.Table, rows: np.ndarray, predicted: np.ndarray) -> dict:
    """Error = eps - k exp(-gamma L), fitted on the five and 1.4B at M = 20, at predicted losses."""
    rows = rows | ((runs["params"] > SMALL) & (runs["chinchilla_mult"] == 1))
    rows &= runs["params"] < 5e9

    def law(loss, eps, k, gamma):
        return eps - k * np.exp(-gamma * loss)

    coefficients, _ = scipy.optimize.curve_fit(
        law, runs["loss"][rows], runs["error"][rows], p0=(0.7, 1.0, 0.7), maxfev=20_000
    )
    large = (runs["params"] > SMALL) & ~rows
    return {
        "coefficients": dict(zip(("eps", "k", "gamma"), map(float, coefficients))),
        "large": [
            {
                "params": float(size),
                "measured": float(error),
                "predicted": float(law(loss, *coefficients)),
            }
            for size, error, loss in zip(
                runs["params"][large], runs["error"][large], predicted[large]
            )
        ],
    }


def _write_tables(results: dict) -> None:
    rows, large = [], []
    for name, found in results.items():
        p = found["params"]
        rows.append(
            [
                name,
                f"{p['a']:.1f}",
                f"{p['b']:.1f}",
                f"{p['E']:.3f}",
                f"{p['eta']:.4f}",
                "{} of {}".format(*found["starts_agreeing"]),
                f"{found['their_mean_error_percent']:.2f}% ({found['small_runs_not_fitted']} runs)",
            ]
        )
        for run in found["large"]:
            size, ratio = run["params"] / 1e9, run["tokens_per_param"]
            figures = [f"{run[key]:.4f}" for key in ("measured", "predicted")]
            large.append(
                [name, f"{size:.1f}B", f"{ratio:.0f}", *figures, f"{run['error_percent']:.3f}%"]
            )
    header = ["training set", "a", "b", "E", "η", "starts agreeing", "error on other small runs"]
    experiment_record.write_table(HERE / "README.md", "coefficients", header, rows)
    header = ["training set", "N", "M = D/N", "loss", "predicted", "error"]
    experiment_record.write_table(HERE / "README.md", "predictions", header, large)
    rows = [
        [
            name,
            f"{run['params'] / 1e9:.1f}B",
            f"{run['measured']:.4f}",
            f"{run['predicted']:.4f}",
            f"{100 * abs(run['predicted'] / run['measured'] - 1):.2f}%",
        ]
        for name, found in results.items()
        for run in found["downstream"]["large"]
    ]
    header = ["training set", "N", "mean error of 7 tasks", "predicted", "relative"]
    experiment_record.write_table(HERE / "README.md", "downstream", header, rows)


def _draw(everything: tables.Table) -> None:
    path = HERE / "figures/overtraining.png"
    with experiment_record.panels(path, 3, size=(12, 4), sharey=True) as panels:
        for panel, (key, name) in zip(panels, TRAIN_SETS.items()):
            runs = tables.where(everything, train_set=key)
            rows = _fitted_rows(runs)
            found = fits.fit(laws.GADRE, tables.take(runs, rows), OPTIONS, num_starts=64)
            for number, ratio in enumerate((1, 4, 16, 32)):
                at = runs["chinchilla_mult"] == ratio
                if not at.any():
                    continue
                color = matplotlib.colormaps["viridis"](number / 3.5)
                flops = 6 * runs["params"] * runs["tokens"]
                panel.plot(flops[at & ~rows], runs["loss"][at & ~rows], "o", ms=4, color=color)
                panel.plot(
                    flops[at & rows], runs["loss"][at & rows], "s", ms=6, mfc="none", color=color
                )
                grid = np.geomspace(1e16, 1e22, 40)
                size = np.sqrt(grid / 6 / (TOKENS_PER_PARAM * ratio))
                curve = {"params": size, "tokens": TOKENS_PER_PARAM * ratio * size}
                label = f"M = {TOKENS_PER_PARAM * ratio}"
                panel.plot(grid, found.predict(curve), color=color, lw=1, label=label)
            panel.set(title=name, xlabel="training FLOPs", xscale="log", yscale="log")
        panels[0].set(ylabel="C4 validation loss, nats per token")
        panels[0].legend(frameon=False)


if __name__ == "__main__":
    main()
