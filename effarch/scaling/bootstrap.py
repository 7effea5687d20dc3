"""How far a fit can be trusted: refits of resampled runs, and bands on its predictions."""

import dataclasses

import numpy as np

from effarch.scaling import fits, tables


@dataclasses.dataclass(frozen=True)
class Bootstrap:
    """Refits of a law to runs drawn with replacement."""

    fit: fits.Fit
    thetas: np.ndarray
    """[resamples, parameters], on the fitted scale."""
    log_residuals: np.ndarray
    """ln output - ln prediction of the measured runs under the fit to all of them [runs]."""

    def values(self, name: str) -> np.ndarray:
        """A parameter in every refit, as written in the formula [resamples]."""
        column = self.thetas[:, self.fit.law.parameters.index(name)]
        return np.exp(column) if name in self.fit.law.positive else column

    def se(self) -> dict[str, float]:
        """Standard error of each fitted parameter."""
        return {name: float(self.values(name).std(ddof=1)) for name in self._fitted()}

    def interval(self, level: float = 0.95) -> dict[str, tuple[float, float]]:
        """Percentile interval of each fitted parameter."""
        tail = (1 - level) / 2
        return {
            name: tuple(map(float, np.quantile(self.values(name), (tail, 1 - tail))))
            for name in self._fitted()
        }

    def covariance(self) -> np.ndarray:
        """Of the parameters on the fitted scale, [parameters, parameters]."""
        return np.cov(self.thetas, rowvar=False)

    def band(
        self, table: tables.Table, *, level: float = 0.95, noise: bool = True, seed: int = 0
    ) -> tuple[np.ndarray, np.ndarray]:
        """Percentile band of the prediction for every row of a table: (low, high).

        With `noise` it is the band of a new run: a measured residual is drawn and added to each
        prediction; without, the band of the law's curve.
        """
        columns = self.fit.law.columns(table)
        logs = np.stack([self.fit.law.log_output(*theta, *columns) for theta in self.thetas])
        if noise:
            logs = logs + np.random.default_rng(seed).choice(self.log_residuals, logs.shape)
        tail = (1 - level) / 2
        low, high = np.exp(np.quantile(logs, (tail, 1 - tail), axis=0))
        return low, high

    def _fitted(self) -> list[str]:
        return [n for n in self.fit.law.parameters if n not in self.fit.options.fixed]


def bootstrap(
    fit: fits.Fit, table: tables.Table, *, resamples: int = 1000, seed: int = 0, extra: int = 2
) -> Bootstrap:
    """Refits the law to `resamples` tables of runs drawn with replacement.

    `table` is the one that was fitted, a row a run (not a checkpoint). Every refit starts from the
    fit to all runs and from `extra` random neighbours of it.
    """
    draw, runs = np.random.default_rng(seed), tables.num_rows(table)
    starts = fits.perturbed(fit, extra, seed)
    thetas = [
        fits.fit(
            fit.law, tables.take(table, draw.integers(runs, size=runs)), fit.options, starts=starts
        ).theta
        for _ in range(resamples)
    ]
    return Bootstrap(fit, np.array(thetas), fit.residuals(table))
