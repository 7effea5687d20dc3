"""Massive activations over training: Hidden Dynamics of Massive Activations, arXiv 2508.03616.

    r_l = mean over sequences of max |h_l| / mean over sequences of median |h_l|
    r(t) = A exp(-lam x) ln(x) + K,   x = gamma t + t0

h_l is the stream after layer l, t the step. The peak is where lam x ln(x) = 1: x = exp(W(1 / lam)) with
Lambert's W; the limit is K.
"""

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
import scipy.optimize
import scipy.special
from jaxtyping import Array, Float

from effarch.analysis import layers

MIN_POINTS = 8
"""Of a fit of five parameters; the paper has 27."""


def ratios(passes: Sequence[layers.Passed]) -> Float[Array, " Y"]:
    """r_l of every layer; of a row all positions count, as it is taken for one sequence."""
    found = []
    for passed in passes:
        size_BN = jnp.abs(passed.after.astype(jnp.float32)).reshape(passed.after.shape[0], -1)
        median = jnp.mean(jnp.median(size_BN, axis=1))
        found.append(jnp.mean(jnp.max(size_BN, axis=1)) / jnp.maximum(median, 1e-30))
    return jnp.stack(found)


def curve(t, A, lam, gamma, t0, K):
    """r(t)."""
    x = gamma * np.asarray(t, float) + t0
    return A * np.exp(-lam * x) * np.log(x) + K


def jacobian(t, A, lam, gamma, t0, K):
    """d r / d (A, lam, gamma, t0, K), [points, 5]."""
    t = np.asarray(t, float)
    x = gamma * t + t0
    fade, log = np.exp(-lam * x), np.log(x)
    by_x = A * fade * (1 / x - lam * log)
    return np.stack([fade * log, -A * x * fade * log, t * by_x, by_x, np.ones_like(t)], axis=1)


@dataclasses.dataclass(frozen=True)
class Fit:
    """The five parameters, in the units of the points; r2 and Akaike's criterion of the fit."""

    params: dict[str, float]
    r2: float
    aic: float

    @property
    def peak(self) -> float | None:
        """The step of the maximum; None if the curve only grows."""
        lam, gamma, t0 = (self.params[name] for name in ("lam", "gamma", "t0"))
        if lam <= 0 or gamma <= 0:
            return None
        x = float(np.exp(scipy.special.lambertw(1 / lam).real))
        return (x - t0) / gamma if np.isfinite(x) else None

    def __call__(self, steps):
        return curve(steps, **self.params)


def fit(steps, values) -> Fit:
    """Least squares (trust region, from several decays). Raises ValueError for too few points."""
    steps, values = np.asarray(steps, float), np.asarray(values, float)
    if len(steps) < MIN_POINTS:
        raise ValueError(
            f"a curve of five parameters needs at least {MIN_POINTS} checkpoints, there are "
            f"{len(steps)}; keep more (checkpoint.keep_period)."
        )
    span, scale = max(np.ptp(steps), 1e-30), max(np.ptp(values), 1e-30)
    t, r = steps / span, values / scale
    low, high = [-np.inf, 1e-9, 0, 1e-6, -np.inf], [np.inf] * 5
    best, lowest = None, np.inf
    for lam in (1 / np.std(t), 0.1, 1.0, 10.0):
        for gamma in (1.0, 10.0):
            start = [np.ptp(r), lam, gamma, 1.0, r.min() + 0.5 * np.ptp(r)]
            options = dict(jac=jacobian, bounds=(low, high), method="trf", max_nfev=2000)
            try:
                found, _ = scipy.optimize.curve_fit(curve, t, r, start, **options)
            except RuntimeError:  # did not converge
                continue
            error = np.sum((curve(t, *found) - r) ** 2)
            if error < lowest:
                best, lowest = found, error
    if best is None:
        raise ValueError("the five-parameter curve fits these points from no start; plot them.")
    A, lam, gamma, t0, K = best
    params = dict(A=A * scale, lam=lam, gamma=gamma / span, t0=t0, K=K * scale)
    spread = np.sum((r - r.mean()) ** 2)
    aic = len(t) * np.log(max(lowest, 1e-30) / len(t)) + 2 * 5
    return Fit({k: float(v) for k, v in params.items()}, float(1 - lowest / spread), float(aic))
