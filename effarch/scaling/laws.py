"""The forms of scaling laws: the logarithm of a prediction, its parameters and where a fit starts.

Sizes N are parameters, D tokens, C FLOPs; losses are nats per token. A law's parameters in
`positive` are fitted as logarithms, so every sum of powers is a log-sum-exp and nothing overflows.
`log_output` also takes complex parameters: `fits` differentiates by them. To add a law: a function
and a line in LAWS.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping

import numpy as np

from effarch import names
from effarch.scaling import tables


@dataclasses.dataclass(frozen=True)
class Law:
    """inputs -> output, ln output = log_output(fitted parameters..., input columns...)."""

    name: str
    inputs: tuple[str, ...]
    """Columns of a table, in the order of `log_output`'s last arguments."""
    grid: Mapping[str, tuple[float, ...]]
    """Parameter -> starting values on the fitted scale."""
    log_output: Callable[..., np.ndarray]
    positive: tuple[str, ...] = ()
    """Parameters that are fitted as logarithms."""
    output: str = "loss"

    @property
    def parameters(self) -> tuple[str, ...]:
        return tuple(self.grid)

    def starts(self) -> np.ndarray:
        """The whole grid of starting points, [starts, parameters]."""
        return np.array(list(itertools.product(*self.grid.values())))

    def to_fitted(self, params: Mapping[str, float]) -> np.ndarray:
        """Parameters as written in the formula -> as fitted."""
        names.refuse_unknown(params, self.parameters, self.name)
        missing = [name for name in self.parameters if name not in params]
        if missing:
            raise ValueError(f"{self.name} needs a value of {missing[0]}; give {self.parameters}.")
        return np.array(
            [math.log(params[n]) if n in self.positive else params[n] for n in self.parameters]
        )

    def from_fitted(self, theta: np.ndarray) -> dict[str, float]:
        """Parameters as fitted -> as written in the formula."""
        return {
            name: float(np.exp(value) if name in self.positive else value)
            for name, value in zip(self.parameters, theta)
        }

    def columns(self, table: tables.Table) -> list[np.ndarray]:
        """The input columns of a table, float64. Raises ValueError for one that is missing or text."""
        return [tables.numbers(table, name) for name in self.inputs]

    def predict(self, params: Mapping[str, float], table: tables.Table) -> np.ndarray:
        """The law's output for every row of a table."""
        return np.exp(self.log_output(*self.to_fitted(params), *self.columns(table)))


def log_sum_exp(*terms: np.ndarray) -> np.ndarray:
    """ln of a sum of exponentials, for complex terms as well."""
    terms = np.broadcast_arrays(*terms)
    largest = np.maximum.reduce([np.real(term) for term in terms])
    return largest + np.log(sum(np.exp(term - largest) for term in terms))


def log_saturating(amount, log_start, log_max):
    """ln of Clark's saturating count, arXiv 2202.01169: 1/x = 1/(amount + s) + 1/max.

    s = (1/start - 1/max)^-1, so that amount 0 gives `start` and a large amount gives `max`.
    """
    shift = 1 / (np.exp(-log_start) - np.exp(-log_max))
    return -np.log(1 / (amount + shift) + np.exp(-log_max))


def _chinchilla(log_A, log_B, log_E, alpha, beta, N, D):
    return log_sum_exp(log_A - alpha * np.log(N), log_B - beta * np.log(D), log_E)


def _gadre(log_a, log_b, log_E, eta, N, D):
    log_C = np.log(6 * N * D)
    log_M = np.log(D / N)
    return log_sum_exp(log_a + eta * (log_M - log_C), log_b - eta * (log_M + log_C), log_E)


def _quartet(log_A, alpha, log_B, beta, log_E, gamma, N, D):
    inner = log_sum_exp(log_A - alpha * np.log(N), log_B - beta * np.log(D))
    return log_sum_exp(gamma * inner, log_E)


def _joint_moe(log_a, alpha, delta, gamma, log_b, beta, omega, zeta, log_c, start, top, N, D, E):
    e = log_saturating(E - 1, start, top)
    return log_sum_exp(
        log_a + delta * e + (alpha + gamma * e) * np.log(N),
        log_b + omega * e + (beta + zeta * e) * np.log(D),
        log_c,
    )


def _clark(a, b, c, d, log_start, log_max, N, E):
    e = log_saturating(E - 1, log_start, log_max) / math.log(10)
    n = np.log10(N)
    return math.log(10) * (a * n + b * e + c * n * e + d)


def _leverage(a, d, gamma, beta, log_start, log_max, A, G, C):
    g = np.log2(G)
    exponent = a + d * np.log10(C) + gamma * g**2 + beta * g
    return exponent * log_saturating(A, log_start, log_max)


CHINCHILLA = Law(
    "chinchilla",
    ("params", "tokens"),
    {
        "A": (0, 5, 10, 15, 20, 25),
        "B": (0, 5, 10, 15, 20, 25),
        "E": (-1, -0.5, 0, 0.5, 1),
        "alpha": (0, 0.5, 1, 1.5, 2),
        "beta": (0, 0.5, 1, 1.5, 2),
    },
    _chinchilla,
    positive=("A", "B", "E"),
)
"""L = E + A N^-alpha + B D^-beta. Hoffmann et al., arXiv 2203.15556, approach 3 and its grid."""

GADRE = Law(
    "gadre",
    ("params", "tokens"),
    {"a": (2, 4, 6, 8), "b": (2, 4, 6, 8), "E": (-0.5, 0.5), "eta": (0.05, 0.1, 0.2, 0.4)},
    _gadre,
    positive=("a", "b", "E"),
)
"""L = E + (a M^eta + b M^-eta) C^-eta, M = D/N, C = 6 N D. Gadre et al., arXiv 2403.08540."""

QUARTET = Law(
    "quartet",
    ("params", "tokens"),
    {
        "A": (6, 9, 12),
        "alpha": (0.4, 0.6),
        "B": (6, 9, 12),
        "beta": (0.4, 0.6),
        "E": (0, 0.3, 0.6),
        "gamma": (0.25, 0.5, 1),
    },
    _quartet,
    positive=("A", "B", "E"),
)
"""L = (A / N^alpha + B / D^beta)^gamma + E; low precision multiplies N by eff_N and D by eff_D.

Castro et al., arXiv 2505.14669. Nearly degenerate over a small range: fix E and gamma there."""

JOINT_MOE = Law(
    "joint_moe",
    ("params_active", "tokens", "experts"),
    {
        "a": (2.5, 3.5),
        "alpha": (-0.3, -0.2),
        "delta": (-0.2,),
        "gamma": (0.0, 0.01),
        "b": (3.0, 4.5),
        "beta": (-0.3, -0.2),
        "omega": (0.0, 0.4),
        "zeta": (-0.02,),
        "c": (0.3,),
        "E_start": (0.7,),
        "E_max": (5.5,),
    },
    _joint_moe,
    positive=("a", "b", "c", "E_start", "E_max"),
)
"""L = a Ê^delta N^(alpha + gamma ln Ê) + b Ê^omega D^(beta + zeta ln Ê) + c, N active parameters.

Ludziejewski et al., arXiv 2502.05172; Ê saturates as in Clark et al."""

CLARK = Law(
    "clark",
    ("params", "experts"),
    {
        "a": (-0.1, -0.05),
        "b": (-0.2, -0.1),
        "c": (0.0, 0.01),
        "d": (1.0, 1.5),
        "E_start": (0.3, 1.0),
        "E_max": (5.0, 6.5),
    },
    _clark,
    positive=("E_start", "E_max"),
)
"""log10 L = a log10 N + b log10 Ê + c log10 N log10 Ê + d at fixed tokens. arXiv 2202.01169."""

LEVERAGE = Law(
    "leverage",
    ("activation", "granularity", "flops"),
    {
        "a": (0.5, 1.5),
        "d": (-0.1, -0.05),
        "gamma": (0.01, 0.02),
        "beta": (-0.15, -0.05),
        "A_start": (-5.0, -3.0),
        "A_max": (20.0,),
    },
    _leverage,
    positive=("A_start", "A_max"),
    output="leverage",
)
"""Dense over MoE FLOPs at equal loss: Â^(a + d log10 C + gamma (log2 G)^2 + beta log2 G).

Tian et al., arXiv 2507.17702. A = active share of experts, G = 2 width / expert width; the paper
prints no bases of its logarithms: these reproduce its figures."""

LAWS = {law.name: law for law in (CHINCHILLA, GADRE, QUARTET, JOINT_MOE, CLARK, LEVERAGE)}
