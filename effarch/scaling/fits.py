"""Fitting a law to runs: Huber or least squares from many starts, with exact gradients.

    minimise  1e3 sum_i w_i Huber_delta(ln prediction_i - ln output_i)

The sum and the factor matter: on the mean the objective is so small that optimizers stop early,
which spoiled a published fit (Besiroglu et al., arXiv 2404.10102). Gradients come from complex steps,
d f / d x = Im f(x + i h) / h, which is exact to rounding and asks nothing of a law.
"""

import dataclasses
from collections.abc import Mapping

import numpy as np
import scipy.optimize
from absl import logging

from effarch import names
from effarch.scaling import tables
from effarch.scaling.laws import Law

SCALE = 1e3
AGREE = 1e-4
"""Starts agree if their objectives differ by this relative amount at most."""
_STEP = 1e-30
_HUGE = 1e30


@dataclasses.dataclass(frozen=True)
class Options:
    """What a fit minimises."""

    delta: float | None = 1e-3
    """Where Huber's loss turns linear; None is least squares."""
    residual: str = "log"
    """log: ln prediction - ln output; linear: prediction - output."""
    fixed: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """Parameters that are not fitted, and their values."""

    def __post_init__(self):
        names.lookup(dict.fromkeys(("log", "linear")), self.residual, "residual")
        if self.delta is not None and self.delta <= 0:
            raise ValueError(f"delta={self.delta} must be above 0, or None for least squares.")


@dataclasses.dataclass(frozen=True)
class Fit:
    """A law fitted to runs."""

    law: Law
    params: dict[str, float]
    objective: float
    """The weighted sum of losses, without SCALE."""
    num_runs: int
    num_starts: int
    num_agreeing: int
    """Starts that ended within AGREE of the best."""
    options: Options

    @property
    def theta(self) -> np.ndarray:
        """The parameters on the fitted scale."""
        return self.law.to_fitted(self.params)

    def predict(self, table: tables.Table) -> np.ndarray:
        """The law's output for every row of a table."""
        return self.law.predict(self.params, table)

    def residuals(self, table: tables.Table) -> np.ndarray:
        """ln output - ln prediction of every row."""
        return np.log(_output(self.law, table)) - np.log(self.predict(table))


def fit(
    law: Law,
    table: tables.Table,
    options: Options | None = None,
    *,
    num_starts: int = 24,
    starts: np.ndarray | None = None,
    weights: np.ndarray | None = None,
) -> Fit:
    """Fits a law to the rows of a table, which holds its inputs and its output as columns.

    Args:
      num_starts: BFGS runs from so many points of the law's grid, spread over the better half of it.
      starts: instead of those, points on the fitted scale [starts, parameters].
      weights: of each row [runs].

    Raises ValueError for fewer runs than parameters and for values that are not above 0.
    """
    options = options or Options()
    problem = _Problem(law, table, options, weights)
    points = problem.choose(law.starts(), num_starts) if starts is None else starts
    ends = [problem.minimise(point) for point in np.atleast_2d(points)]
    finite = [end for end in ends if np.isfinite(end[0])]
    if not finite:
        raise ValueError(f"{law.name}: no start led to a finite fit; give other starts.")
    best, theta = min(finite, key=lambda end: end[0])
    agreeing = sum(value <= best * (1 + AGREE) + 1e-12 for value, _ in finite)
    logging.info("%s: %d of %d starts reached the best fit.", law.name, agreeing, len(ends))
    return Fit(
        law=law,
        params=law.from_fitted(theta),
        objective=best / SCALE,
        num_runs=tables.num_rows(table),
        num_starts=len(ends),
        num_agreeing=agreeing,
        options=options,
    )


class _Problem:
    """The objective of one table, as a function of the parameters that are not fixed."""

    def __init__(self, law: Law, table, options: Options, weights: np.ndarray | None):
        names.refuse_unknown(options.fixed, law.parameters, law.name)
        self.law, self.options = law, options
        self.inputs, self.output = law.columns(table), _output(law, table)
        self.weights = np.ones(len(self.output)) if weights is None else np.asarray(weights)
        self.free = np.array([name not in options.fixed for name in law.parameters])
        filler = law.from_fitted(np.zeros(len(law.parameters)))
        self.held = law.to_fitted({**filler, **options.fixed})
        if len(self.output) < self.free.sum():
            raise ValueError(
                f"{law.name} has {self.free.sum()} parameters to fit and the table only "
                f"{len(self.output)} runs; add runs, or fix parameters."
            )

    def choose(self, grid: np.ndarray, count: int) -> np.ndarray:
        """`count` grid points: every so many of the better half, ranked by objective."""
        grid = np.unique(np.where(self.free, grid, self.held), axis=0)
        ranked = grid[np.argsort([self._value(point) for point in grid], kind="stable")]
        half = ranked[: max(len(ranked) // 2, min(count, len(ranked)))]
        return half[np.unique(np.linspace(0, len(half) - 1, count).astype(int))]

    def minimise(self, start: np.ndarray) -> tuple[float, np.ndarray]:
        """(objective, parameters) where BFGS ends."""
        theta = np.where(self.free, start, self.held)

        def objective(free: np.ndarray) -> tuple[float, np.ndarray]:
            theta[self.free] = free
            return self._value_and_gradient(theta)

        with np.errstate(all="ignore"):
            found = scipy.optimize.minimize(
                objective, theta[self.free], jac=True, method="BFGS", options={"gtol": 1e-7}
            )
        theta[self.free] = found.x
        return float(found.fun), theta.copy()

    def _value(self, theta: np.ndarray) -> float:
        with np.errstate(all="ignore"):
            residuals = self._residuals(self.law.log_output(*theta, *self.inputs))
            return float(np.nan_to_num(SCALE * self.weights @ self._loss(residuals), nan=_HUGE))

    def _value_and_gradient(self, theta: np.ndarray) -> tuple[float, np.ndarray]:
        """Each free parameter's complex step is one row of one evaluation."""
        directions = np.eye(len(theta))[self.free]
        points = theta + 1j * _STEP * directions
        log_outputs = self.law.log_output(*points.T[:, :, None], *self.inputs)
        residuals = self._residuals(log_outputs)
        slopes, errors = residuals.imag / _STEP, residuals[0].real
        delta = self.options.delta
        pull = self.weights * (errors if delta is None else np.clip(errors, -delta, delta))
        value, gradient = SCALE * self.weights @ self._loss(errors), SCALE * slopes @ pull
        if not (np.isfinite(value) and np.isfinite(gradient).all()):
            return _HUGE, np.zeros(len(gradient))
        return float(value), gradient

    def _residuals(self, log_output: np.ndarray) -> np.ndarray:
        if self.options.residual == "log":
            return log_output - np.log(self.output)
        return np.exp(log_output) - self.output

    def _loss(self, errors: np.ndarray) -> np.ndarray:
        delta, size = self.options.delta, np.abs(errors)
        if delta is None:
            return errors**2 / 2
        return np.where(size <= delta, errors**2 / 2, delta * (size - delta / 2))


def _output(law: Law, table: tables.Table) -> np.ndarray:
    output = tables.numbers(table, law.output)
    for name, column in zip((law.output, *law.inputs), (output, *law.columns(table))):
        if not (column > 0).all():
            raise ValueError(
                f"column {name} holds {column[~(column > 0)][0]}; every value must be above 0."
            )
    return output


def perturbed(fit: Fit, count: int, seed: int, size: float = 0.1) -> np.ndarray:
    """The fit's parameters and `count` random neighbours of them, [count + 1, parameters]."""
    draw = np.random.default_rng(seed).standard_normal((count, len(fit.theta)))
    return np.concatenate([fit.theta[None], fit.theta * (1 + size * draw)])


def leave_largest_out(
    law: Law,
    table: tables.Table,
    options: Options | None = None,
    *,
    within: float = 0.1,
    num_starts: int = 24,
) -> dict[str, float]:
    """How well a fit to the smaller runs predicts the largest ones.

    The largest are the rows whose FLOPs are within this share of the maximum. Returns the number
    held out, the mean absolute error in percent of the output and, if the law has an
    irreducible loss E, in percent of output - E.
    """
    flops = tables.numbers(table, "flops")
    held_out = flops >= (1 - within) * flops.max()
    fitted = fit(law, tables.take(table, ~held_out), options, num_starts=num_starts)
    largest = tables.take(table, held_out)
    error = np.abs(fitted.predict(largest) - largest[law.output])
    figures = {
        "held_out": int(held_out.sum()),
        "percent": float(100 * np.mean(error / largest[law.output])),
    }
    if "E" in fitted.params:
        above = largest[law.output] - fitted.params["E"]
        figures["percent_above_irreducible"] = float(100 * np.mean(error / above))
    return figures
