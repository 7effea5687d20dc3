"""IsoFLOP vertices, envelope and power laws on curves whose optimum is known."""

import functools

import numpy as np
import pytest

from effarch.scaling import isoflop

BUDGETS = (1e15, 1e16, 1e17, 1e18)


def best_size(flops):
    return 0.1 * flops**0.5


def runs(factors=(0.25, 0.4, 0.63, 1, 1.6, 2.5, 4), budgets=BUDGETS):
    """loss = 3 + 0.1 (ln N - ln N*)^2 at each budget."""
    rows = [(c, f * best_size(c), 3 + 0.1 * np.log(f) ** 2) for c in budgets for f in factors]
    return [np.array(column) for column in zip(*rows)]


def no_noise(losses):
    return np.zeros(len(losses))


def test_vertices_and_their_power_law():
    found = isoflop.vertices(*runs())
    np.testing.assert_allclose(found.size, [best_size(c) for c in BUDGETS], rtol=1e-9)
    np.testing.assert_allclose(found.loss, 3, rtol=1e-12)
    np.testing.assert_allclose(found.curvature, 0.1, rtol=1e-9)
    law = isoflop.power_law(found.flops, found.size)
    assert law.exponent == pytest.approx(0.5)
    assert law.coefficient == pytest.approx(0.1)
    assert law.exponent_se == pytest.approx(0, abs=1e-9)
    assert law(1e20) == pytest.approx(1e9)
    assert found.dropped == ()


def test_runs_that_miss_their_budget_a_little_are_of_one():
    """As those of a ladder, whose steps are whole numbers."""
    flops, sizes, losses = runs()
    noise = np.random.default_rng(0).uniform(0.985, 1.015, len(flops))
    mixed = np.random.default_rng(1).permutation(len(flops))
    found = isoflop.same_budgets((flops * noise)[mixed])
    assert len(np.unique(found)) == len(BUDGETS)
    np.testing.assert_allclose(found, flops[mixed], rtol=0.015)
    assert len(isoflop.vertices(found, sizes[mixed], losses[mixed]).size) == len(BUDGETS)
    assert len(isoflop.vertices(flops * noise, sizes, losses).size) == 0
    assert len(np.unique(isoflop.same_budgets(flops * noise, within=1e-6))) == len(flops)


def test_the_order_of_the_runs_does_not_matter():
    columns = runs()
    mixed = np.random.default_rng(0).permutation(len(columns[0]))
    found = isoflop.vertices(*(column[mixed] for column in columns))
    np.testing.assert_allclose(found.size, isoflop.vertices(*columns).size)


def test_a_budget_whose_optimum_is_at_the_edge_is_dropped():
    flops, sizes, losses = runs()
    at_edge = (flops == 1e16) & (sizes > 0.7 * best_size(1e16))
    kept = [column[~at_edge] for column in (flops, sizes, losses)]
    found = isoflop.vertices(*kept)
    assert found.dropped == (1e16,)
    assert len(found.flops) == 3
    few = (flops == 1e17) & (sizes > 2 * best_size(1e17))
    one_beyond = [column[~few] for column in (flops, sizes, losses)]
    assert isoflop.vertices(*one_beyond).dropped == (1e17,)
    assert isoflop.vertices(*one_beyond, min_side=1).dropped == ()


def test_curves_without_a_minimum_give_no_vertex():
    flops, sizes, losses = runs()
    assert len(isoflop.vertices(flops, sizes, 6 - losses).flops) == 0


def test_power_law_weights_and_standard_error():
    x, y = np.array([1.0, 10, 100, 1000]), np.array([2.0, 20, 200, 9000])
    assert isoflop.power_law(x, y, np.array([1, 1, 1, 0])).exponent == pytest.approx(1)
    design = np.stack([np.ones(4), np.log(x)], axis=1)
    solution, rest, *_ = np.linalg.lstsq(design, np.log(y), rcond=None)
    covariance = rest[0] / 2 * np.linalg.inv(design.T @ design)
    law = isoflop.power_law(x, y)
    assert law.exponent == pytest.approx(solution[1])
    assert law.exponent_se == pytest.approx(np.sqrt(covariance[1, 1]))
    with pytest.raises(ValueError, match="needs 2 points, there are 1"):
        isoflop.power_law(x[:1], y[:1])


def test_exponent_band_widens_with_the_noise():
    def band(columns, std, resamples=60):
        noise = functools.partial(np.full_like, fill_value=std)
        return isoflop.exponent_band(isoflop.resampled(*columns, noise, resamples=resamples))

    assert band(runs(), 0.0, 3) == pytest.approx((0.5, 0.5))
    small, large = band(runs(), 0.002), band(runs(), 0.01)
    assert large[0] < small[0] < 0.5 < small[1] < large[1]
    with pytest.raises(ValueError, match="no resample of the budgets left two with a vertex"):
        band(runs(budgets=(1e16,)), 0.0)


def test_akima_optimum():
    _, sizes, losses = runs(factors=np.geomspace(0.2, 6, 9), budgets=(1e16,))
    size, spread = isoflop.akima_optimum(
        sizes, losses, lambda x: np.full(len(x), 1e-4), resamples=50
    )
    assert size == pytest.approx(best_size(1e16), rel=0.1)
    assert 0 < spread < 0.2
    assert isoflop.akima_optimum(sizes[5:], losses[5:], no_noise, resamples=5) is None


def test_envelope_takes_the_lowest_curve_at_each_budget():
    """Curves L = 1 + 1/N + N/C touch their envelope at N = sqrt(C)."""
    sizes = np.geomspace(1, 1e4, 41)
    rows = [(c, n, 1 + 1 / n + n / c) for n in sizes for c in np.geomspace(1, 1e9, 181)]
    flops, best, loss = isoflop.envelope(*(np.array(column) for column in zip(*rows)))
    assert best.min() > 1
    assert best.max() < 1e4
    law = isoflop.power_law(flops, best)
    assert law.exponent == pytest.approx(0.5, abs=0.01)
    np.testing.assert_allclose(loss, 1 + 2 / np.sqrt(flops), rtol=0.01)
