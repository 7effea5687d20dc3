"""Refits the Chinchilla law to the runs of its Figure 4: python experiments/chinchilla_refit/run.py

Writes results/refit.json, figures/refit.png and the tables of README.md. Two minutes on one core.
"""

import pathlib

import numpy as np
import scipy.stats

from effarch import experiment_record
from effarch.scaling import allocation, bootstrap, fits, laws, published, tables

HERE = pathlib.Path(__file__).resolve().parent
DROPPED = 5
STARTS, RESAMPLES = 96, 1000
BUDGET = 5.76e23


def main() -> None:
    everything = tables.read_csv(HERE / "data/chinchilla_fig4_points.csv")
    runs = tables.take(everything, np.sort(np.argsort(everything["loss"])[:-DROPPED]))
    refit = fits.fit(laws.CHINCHILLA, runs, num_starts=STARTS)
    refits = bootstrap.bootstrap(refit, runs, resamples=RESAMPLES, seed=42)
    with_outliers = fits.fit(laws.CHINCHILLA, everything, num_starts=STARTS)
    rows = {
        "Hoffmann et al., as published": published.CHINCHILLA["hoffmann"],
        "Besiroglu et al., as published": published.CHINCHILLA["besiroglu"],
        "this refit, 240 runs": refit.params,
        "this refit, nothing dropped (245)": with_outliers.params,
    }
    results = {
        "rows": {name: params | _allocation(params) for name, params in rows.items()},
        "objective": refit.objective,
        "objective_of_hoffmann": _objective(published.CHINCHILLA["hoffmann"], runs),
        "runs": refit.num_runs,
        "starts_agreeing": [refit.num_agreeing, refit.num_starts],
        "standard_errors": refits.se(),
        "interval_95": refits.interval(),
        "exponent_interval_95": _exponent_interval(refits),
        "leave_largest_out": fits.leave_largest_out(laws.CHINCHILLA, runs, within=0.7),
        "likelihood_ratio": _likelihood_ratio(refit, runs),
    }
    experiment_record.write_json(HERE / "results/refit.json", results)
    _write_tables(results)
    _draw(refit, refits, runs)


def _allocation(params: dict[str, float]) -> dict[str, float]:
    size, tokens = allocation.optimum(params, BUDGET)
    return {
        "exponent": allocation.exponent(params),
        "optimal_params": float(size),
        "tokens_per_param": float(tokens / size),
    }


def _exponent_interval(refits: bootstrap.Bootstrap) -> list[float]:
    alpha, beta = refits.values("alpha"), refits.values("beta")
    return list(map(float, np.quantile(beta / (alpha + beta), (0.025, 0.975))))


def _objective(params: dict[str, float], runs: tables.Table, delta: float = 1e-3) -> float:
    error = np.abs(np.log(laws.CHINCHILLA.predict(params, runs) / runs["loss"]))
    return float(np.where(error <= delta, error**2 / 2, delta * (error - delta / 2)).sum())


def _likelihood_ratio(refit: fits.Fit, runs: tables.Table) -> dict[str, float]:
    """Hoffmann's parameters against the refit under a Huber density whose scale is fitted."""

    def log_likelihood(params: dict[str, float]) -> float:
        residuals = np.log(laws.CHINCHILLA.predict(params, runs) / runs["loss"])
        scales = np.geomspace(1e-4, 1e-1, 2001)
        delta = 1e-3  # in units of the residual; the density is exp(-Huber(r / s, delta / s)) / Z
        best = -np.inf
        for scale in scales:
            z, d = np.abs(residuals) / scale, delta / scale
            cost = np.where(z <= d, z**2 / 2, d * (z - d / 2)).sum()
            inside = np.sqrt(2 * np.pi) * (1 - 2 * scipy.stats.norm.sf(d))
            tails = 2 / d * np.exp(-(d**2) / 2)
            best = max(best, -cost - len(residuals) * np.log(scale * (inside + tails)))
        return float(best)

    twice = 2 * (log_likelihood(refit.params) - log_likelihood(published.CHINCHILLA["hoffmann"]))
    return {"twice_log_ratio": twice, "p_value": float(scipy.stats.chi2.sf(twice, 5))}


def _write_tables(results: dict) -> None:
    names = ("A", "B", "E", "alpha", "beta", "exponent")
    rows = [
        [
            name,
            *(f"{row[key]:.4g}" for key in names),
            f"{row['optimal_params'] / 1e9:.1f}B",
            f"{row['tokens_per_param']:.0f}",
        ]
        for name, row in results["rows"].items()
    ]
    errors = results["standard_errors"]
    rows.append(
        [f"standard errors ({RESAMPLES} resamples)"]
        + [f"{errors[name]:.2g}" for name in names[:-1]]
        + ["", "", ""]
    )
    header = ["fit", "A", "B", "E", "α", "β", "a = β/(α+β)", "N* at 5.76e23", "tokens / parameter"]
    experiment_record.write_table(HERE / "README.md", "parameters", header, rows)
    low, high = results["exponent_interval_95"]
    left_out, ratio = results["leave_largest_out"], results["likelihood_ratio"]
    rows = [
        ["objective of the refit (sum, δ = 1e-3)", f"{results['objective']:.7f}"],
        ["objective of Hoffmann's parameters", f"{results['objective_of_hoffmann']:.7f}"],
        ["starts that end at the optimum", "{} of {}".format(*results["starts_agreeing"])],
        ["95% interval of a", f"{low:.3f} to {high:.3f}"],
        ["2 Δ log likelihood, refit against Hoffmann", f"{ratio['twice_log_ratio']:.1f}"],
        ["p value (5 degrees of freedom)", f"{ratio['p_value']:.1e}"],
        ["largest runs held out", left_out["held_out"]],
        ["their error, % of L", f"{left_out['percent']:.2f}"],
        ["their error, % of L - E", f"{left_out['percent_above_irreducible']:.1f}"],
    ]
    experiment_record.write_table(HERE / "README.md", "figures", ["figure", "value"], rows)


def _draw(refit: fits.Fit, refits: bootstrap.Bootstrap, runs: tables.Table) -> None:
    path = HERE / "figures/refit.png"
    with experiment_record.panels(path, 2, size=(10, 4)) as (left, right):
        points = left.scatter(
            refit.predict(runs), runs["loss"], c=np.log10(runs["flops"]), s=9, cmap="viridis"
        )
        ends = [runs["loss"].min() * 0.98, runs["loss"].max() * 1.02]
        left.plot(ends, ends, color="0.6", lw=0.8)
        left.set(
            xlabel="predicted loss, nats per token", ylabel="measured", xscale="log", yscale="log"
        )
        left.figure.colorbar(points, ax=left, label="log10 FLOPs")
        flops = np.geomspace(1e18, 1e25, 60)
        ratios = []
        for alpha, beta, A, B in zip(*(refits.values(n) for n in ("alpha", "beta", "A", "B"))):
            size, tokens = allocation.optimum({"alpha": alpha, "beta": beta, "A": A, "B": B}, flops)
            ratios.append(tokens / size)
        right.fill_between(flops, *np.quantile(ratios, (0.025, 0.975), axis=0), alpha=0.25, lw=0)
        for label, params in (
            ("refit", refit.params),
            ("Hoffmann", published.CHINCHILLA["hoffmann"]),
        ):
            size, tokens = allocation.optimum(params, flops)
            right.plot(flops, tokens / size, label=label)
        right.axhline(20, color="0.6", lw=0.8, ls="--", label="20 tokens a parameter")
        right.set(xlabel="training FLOPs", ylabel="optimal tokens per parameter")
        right.set(xscale="log", yscale="log")
        right.legend(frameon=False)


if __name__ == "__main__":
    main()
