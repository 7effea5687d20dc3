"""The activation ratio over training: Sparsing Law, arXiv 2411.02335, equations 3 and 4.

    ReLU  A(D) = exp(-c D^a + b) + A0    falls to A0          SiLU  A(D) = A0 - c / D^a    rises to it

D is in billions of tokens. Fitted by least squares; leave out what was measured during warm-up.
"""

import dataclasses

import numpy as np
import scipy.optimize

from effarch import names


def relu(tokens, a, b, c, limit):
    """A(D) of ReLU models; tokens in billions."""
    return np.exp(np.minimum(b - c * tokens**a, 50.0)) + limit


def silu(tokens, a, c, limit):
    """A(D) of SiLU models; tokens in billions."""
    return limit - c / tokens**a


LAWS = {"relu": relu, "silu": silu}
_NAMES = {"relu": ("a", "b", "c", "limit"), "silu": ("a", "c", "limit")}


@dataclasses.dataclass(frozen=True)
class Fit:
    """A fitted law; `r2` is the explained share of the variance."""

    law: str
    params: dict[str, float]
    r2: float

    def __call__(self, tokens):
        """The ratio after so many tokens (a plain count)."""
        return LAWS[self.law](np.asarray(tokens, float) / 1e9, **self.params)


def fit(law: str, tokens, ratios) -> Fit:
    """Fits by Levenberg-Marquardt from several starts. Raises ValueError for too few points."""
    function = names.lookup(LAWS, law, "law")
    scale = np.asarray(tokens, float) / 1e9
    ratios = np.asarray(ratios, float)
    if len(ratios) <= len(_NAMES[law]) or (scale <= 0).any():
        raise ValueError(
            f"the {law} law needs more than {len(_NAMES[law])} points with tokens above 0, it has "
            f"{len(ratios)}; keep more checkpoints (checkpoint.keep_period)."
        )
    best, lowest = None, np.inf
    for start in _starts(law, scale, ratios):
        try:
            found, _ = scipy.optimize.curve_fit(function, scale, ratios, start, maxfev=20_000)
        except RuntimeError:  # did not converge
            continue
        error = np.sum((function(scale, *found) - ratios) ** 2)
        if np.isfinite(error) and error < lowest:
            best, lowest = found, error
    if best is None:
        raise ValueError(f"the {law} law fits these points from no start; look at them first.")
    spread = np.sum((ratios - ratios.mean()) ** 2)
    params = dict(zip(_NAMES[law], map(float, best)))
    return Fit(law, params, float(1 - lowest / max(spread, 1e-30)))


def _starts(law: str, scale, ratios):
    """The decay over the span of the points by different powers."""
    span = np.ptp(ratios) + 1e-6
    for a in (0.1, 0.3, 0.7, 1.0, 1.5):
        if law == "silu":
            yield a, span * scale.min() ** a, ratios.max()
            continue
        for falls in (1.0, 3.0):
            c = falls / max(scale.max() ** a - scale.min() ** a, 1e-9)
            yield a, np.log(span) + c * scale.min() ** a, c, max(ratios.min() - 0.05 * span, 1e-6)
