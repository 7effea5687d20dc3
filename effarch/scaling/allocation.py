"""What a fitted law says about spending: the best size for a budget, the price of a format.

C = 6 N D throughout. Minimising E + A N^-alpha + B D^-beta under it gives N* = G (C/6)^a and
D* = (C/6)^(1-a) / G with a = beta / (alpha + beta), G = (alpha A / (beta B))^(1 / (alpha + beta)).
Hoffmann et al., arXiv 2203.15556, equation 4.
"""

from collections.abc import Mapping

import numpy as np
import scipy.optimize
import scipy.special

from effarch.scaling import laws, tables


def exponent(params: Mapping[str, float]) -> float:
    """a of N* = k C^a under a Chinchilla law."""
    return params["beta"] / (params["alpha"] + params["beta"])


def optimum(params: Mapping[str, float], flops: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(N*, D*) of a Chinchilla law at C = 6 N D FLOPs."""
    alpha, beta, a = params["alpha"], params["beta"], exponent(params)
    factor = (alpha * params["A"] / (beta * params["B"])) ** (1 / (alpha + beta))
    pairs = np.asarray(flops, np.float64) / 6
    return factor * pairs**a, pairs ** (1 - a) / factor


def gadre_as_chinchilla(params: Mapping[str, float]) -> dict[str, float]:
    """Gadre's law in Chinchilla's parameters: alpha = beta = 2 eta."""
    eta = params["eta"]
    return {
        "A": params["a"] * 6**-eta,
        "B": params["b"] * 6**-eta,
        "E": params["E"],
        "alpha": 2 * eta,
        "beta": 2 * eta,
    }


def joint_moe_as_chinchilla(params: Mapping[str, float], experts: float) -> dict[str, float]:
    """The joint MoE law at one number of experts; N is then the active parameters."""
    log_e = float(
        laws.log_saturating(experts - 1, np.log(params["E_start"]), np.log(params["E_max"]))
    )
    return {
        "A": params["a"] * np.exp(params["delta"] * log_e),
        "B": params["b"] * np.exp(params["omega"] * log_e),
        "E": params["c"],
        "alpha": -(params["alpha"] + params["gamma"] * log_e),
        "beta": -(params["beta"] + params["zeta"] * log_e),
    }


def efficiency(
    law: laws.Law,
    params: Mapping[str, float],
    table: tables.Table,
    factor: str,
    *,
    delta: float | None = None,
) -> tuple[float, float]:
    """(eff, root mean square of the log residuals): how much of a column a number format leaves.

    The law's coefficients are those of unquantised runs; the one number that is fitted multiplies the
    column `factor` (params for a forward format's eff_N, tokens for a backward format's eff_D) such
    that the table's log residuals are least, by Huber's loss of `delta` or squared (None). Castro et
    al., arXiv 2505.14669.
    """
    log_loss = np.log(table[law.output])

    def residuals(log_eff: float) -> np.ndarray:
        scaled = {**table, factor: table[factor] * np.exp(log_eff)}
        return np.log(law.predict(params, scaled)) - log_loss

    def total(log_eff: float) -> float:
        return np.sum(scipy.special.huber(np.inf if delta is None else delta, residuals(log_eff)))

    found = scipy.optimize.minimize_scalar(
        total,
        bounds=(np.log(1e-3), np.log(10)),
        method="bounded",
        options={"xatol": 1e-8},
    )
    return float(np.exp(found.x)), float(np.sqrt(np.mean(residuals(found.x) ** 2)))
