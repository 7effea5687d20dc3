"""Fits of curves over training against the numbers that made the points."""

import numpy as np
import pytest

from effarch.analysis import massive, sparsing_law

ROWS = {  # Sparsing Law, arXiv 2411.02335, tables of the two laws
    ("relu", "0.1B"): dict(a=0.101, b=-0.0151, c=3.20, limit=0.0614),
    ("relu", "0.8B"): dict(a=1.01, b=-3.49, c=7.97e-3, limit=0.0721),
    ("silu", "0.1B"): dict(a=0.479, c=0.102, limit=0.409),
    ("silu", "0.8B"): dict(a=0.995, c=0.562, limit=0.383),
}


def test_the_laws_have_the_published_values():
    """10.16 %, 7.88 % and 6.74 % after 1, 10 and 100 billion tokens; 30.7 %, 37.5 %, 39.8 %."""
    tokens = np.array([1.0, 10.0, 100.0])
    relu = sparsing_law.relu(tokens, **ROWS["relu", "0.1B"])
    silu = sparsing_law.silu(tokens, **ROWS["silu", "0.1B"])
    np.testing.assert_allclose(relu, [0.1016, 0.0788, 0.0674], atol=1e-4)
    np.testing.assert_allclose(silu, [0.307, 0.375, 0.398], atol=6e-4)


@pytest.mark.parametrize(("law", "size"), ROWS)
def test_the_laws_are_recovered(law, size):
    """Within 0.2 points of the curve, from points with noise of 0.02 points."""
    params = ROWS[law, size]
    billions = np.geomspace(2, 300, 40)
    exact = sparsing_law.LAWS[law](billions, **params)
    noise = 2e-4 * np.random.default_rng(0).standard_normal(40)
    fit = sparsing_law.fit(law, billions * 1e9, exact + noise)
    assert np.abs(fit(billions * 1e9) - exact).max() < 2e-3
    assert fit.r2 > 0.9
    assert fit.params["limit"] == pytest.approx(params["limit"], abs=5e-3)


def test_too_few_points_are_refused():
    with pytest.raises(ValueError, match="needs more than 4 points"):
        sparsing_law.fit("relu", [1e9, 2e9, 3e9], [0.3, 0.2, 0.1])
    with pytest.raises(ValueError, match="Did you mean 'relu'"):
        sparsing_law.fit("rleu", [1e9], [0.3])
    with pytest.raises(ValueError, match="at least 8 checkpoints, there are 3"):
        massive.fit([1, 2, 3], [1, 2, 3])


PARAMS = dict(A=90.0, lam=0.35, gamma=4e-4, t0=1.2, K=20.0)


def test_the_jacobian():
    t = np.linspace(0, 40_000, 9)
    exact = massive.jacobian(t, **PARAMS)
    for column, (name, value) in enumerate(PARAMS.items()):
        step = 1e-6 * value
        up, down = (massive.curve(t, **PARAMS | {name: value + s}) for s in (step, -step))
        np.testing.assert_allclose(exact[:, column], (up - down) / (2 * step), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("lam", [0.35, 0.05])
def test_massive_activations_are_fitted(lam):
    """1 % noise: R2 above 0.99, and the peak by Lambert's W where the curve has its maximum."""
    params = PARAMS | {"lam": lam}
    steps = np.linspace(0, 60_000, 40)
    exact = massive.curve(steps, **params)
    noise = 1 + 0.01 * np.random.default_rng(0).standard_normal(40)
    fit = massive.fit(steps, exact * noise)
    assert fit.r2 > (0.99 if lam == 0.05 else 0.97)
    fine = np.linspace(0, 400_000, 400_001)
    assert fit.peak == pytest.approx(fine[np.argmax(fit(fine))], rel=0.01)
    assert np.abs(fit(steps) - exact).max() < 0.03 * np.ptp(exact)
