"""Every law against its formula written as plain arithmetic, and fits that must find it again."""

import math

import numpy as np
import pytest

from effarch.scaling import allocation, bootstrap, fits, laws, published, tables


def expanded(amount, start, top):
    return 1 / (1 / (amount + 1 / (1 / start - 1 / top)) + 1 / top)


def chinchilla(p, N, D):
    return p["E"] + p["A"] / N ** p["alpha"] + p["B"] / D ** p["beta"]


def gadre(p, N, D):
    M, C = D / N, 6 * N * D
    return p["E"] + (p["a"] * M ** p["eta"] + p["b"] * M ** -p["eta"]) * C ** -p["eta"]


def quartet(p, N, D):
    return (p["A"] / N ** p["alpha"] + p["B"] / D ** p["beta"]) ** p["gamma"] + p["E"]


def joint_moe(p, N, D, E):
    e = expanded(E - 1, p["E_start"], p["E_max"])
    return (
        p["a"] * e ** p["delta"] * N ** (p["alpha"] + p["gamma"] * math.log(e))
        + p["b"] * e ** p["omega"] * D ** (p["beta"] + p["zeta"] * math.log(e))
        + p["c"]
    )


def clark(p, N, E):
    e, n = math.log10(expanded(E - 1, p["E_start"], p["E_max"])), math.log10(N)
    return 10 ** (p["a"] * n + p["b"] * e + p["c"] * n * e + p["d"])


def leverage(p, A, G, C):
    g = math.log2(G)
    power = p["a"] + p["d"] * math.log10(C) + p["gamma"] * g * g + p["beta"] * g
    return expanded(A, p["A_start"], p["A_max"]) ** power


SIZES, TOKENS = (1e7, 1e8, 1e9, 1e10), (1e9, 2e10, 4e11)
EXPERTS = (1, 4, 16, 64)
CASES = {
    "chinchilla": (chinchilla, published.CHINCHILLA["besiroglu"], (SIZES, TOKENS)),
    "gadre": (gadre, dict(a=212.2, b=366.7, E=1.837, eta=0.1364), (SIZES, TOKENS)),
    "quartet": (quartet, published.QUARTET, (SIZES, TOKENS)),
    "joint_moe": (joint_moe, published.JOINT_MOE, (SIZES, TOKENS, EXPERTS)),
    "clark": (clark, published.CLARK["s_base"], (SIZES, (1, 2, 8, 32, 128, 512))),
    "leverage": (leverage, published.LEVERAGE, ((0.01, 0.1, 0.5), (2, 8, 16), (1e19, 1e20, 1e21))),
}


def table(name):
    """Every combination of inputs, and the output by plain arithmetic."""
    formula, params, axes = CASES[name]
    columns = [axis.ravel() for axis in np.meshgrid(*axes, indexing="ij")]
    law = laws.LAWS[name]
    values = [formula(params, *map(float, row)) for row in zip(*columns)]
    return dict(zip(law.inputs, columns)) | {law.output: np.array(values)}


@pytest.mark.parametrize("name", CASES)
def test_a_law_is_its_formula(name):
    runs, law = table(name), laws.LAWS[name]
    np.testing.assert_allclose(law.predict(CASES[name][1], runs), runs[law.output], rtol=1e-12)


@pytest.mark.parametrize("name", ["gadre", "clark", "leverage", "joint_moe"])
def test_a_fit_finds_the_law_that_made_the_runs(name):
    """Parameters may trade off against each other; what they predict must not."""
    runs, law = table(name), laws.LAWS[name]
    found = fits.fit(law, runs, num_starts=6)
    np.testing.assert_allclose(found.predict(runs), runs[law.output], rtol=2e-3)


def test_fixed_parameters_stay_and_the_others_are_found():
    runs, params = table("quartet"), published.QUARTET
    fixed = {name: params[name] for name in ("E", "gamma")}
    found = fits.fit(laws.QUARTET, runs, fits.Options(fixed=fixed), num_starts=6)
    assert found.params == pytest.approx(params, rel=1e-2)
    assert {name: found.params[name] for name in fixed} == pytest.approx(fixed, rel=1e-12)


@pytest.mark.parametrize(
    ("experts", "expected"),
    [
        (1, (30.3640, 0.1817, 53.9838, 0.1965)),
        (8, (21.8330, 0.1676, 119.9126, 0.2338)),
        (32, (16.5424, 0.1557, 234.6726, 0.2652)),
    ],
)
def test_joint_moe_reduces_to_the_published_laws(experts, expected):
    reduced = allocation.joint_moe_as_chinchilla(published.JOINT_MOE, experts)
    found = [reduced[name] for name in ("A", "alpha", "B", "beta")]
    assert found == pytest.approx(expected, rel=0.01)  # the coefficients are rounded
    runs = {"params_active": np.array([1e9]), "tokens": np.array([1e11]), "experts": experts}
    full = laws.JOINT_MOE.predict(published.JOINT_MOE, runs | {"experts": np.array([experts])})
    assert chinchilla(reduced, 1e9, 1e11) == pytest.approx(full[0], rel=1e-12)


@pytest.mark.parametrize(
    ("activation", "expected"), [(0.25, 2.36), (0.125, 3.56), (0.0625, 5.20), (0.031, 7.24)]
)
def test_leverage_gives_the_published_figures(activation, expected):
    runs = {name: np.array([v]) for name, v in zip(laws.LEVERAGE.inputs, (activation, 12.0, 1e22))}
    assert laws.LEVERAGE.predict(published.LEVERAGE, runs)[0] == pytest.approx(expected, abs=0.01)


def test_gadre_is_a_chinchilla_law():
    params = CASES["gadre"][1]
    same = allocation.gadre_as_chinchilla(params)
    assert chinchilla(same, 3e8, 7e9) == pytest.approx(gadre(params, 3e8, 7e9), rel=1e-12)


def test_the_optimum_is_the_least_loss_at_its_budget():
    params = published.CHINCHILLA["besiroglu"]
    size, tokens = allocation.optimum(params, 1e21)
    assert 6 * size * tokens == pytest.approx(1e21, rel=1e-12)
    best = chinchilla(params, size, tokens)
    for factor in (0.9, 0.99, 1.01, 1.1):
        assert chinchilla(params, size * factor, tokens / factor) > best


def noisy_runs():
    runs = table("gadre")
    runs["flops"] = 6 * runs["params"] * runs["tokens"]
    noise = np.random.default_rng(1).normal(0, 0.01, len(runs["loss"]))
    return runs | {"loss": runs["loss"] * np.exp(noise)}


def test_bands_cover_the_law_and_new_runs():
    runs = noisy_runs()
    options = fits.Options(delta=None)
    found = fits.fit(laws.GADRE, runs, options, num_starts=6)
    refits = bootstrap.bootstrap(found, runs, resamples=60, extra=0)
    truth = table("gadre")
    low, high = refits.band(truth, noise=False)
    wide_low, wide_high = refits.band(truth)
    inside = (low <= truth["loss"]) & (truth["loss"] <= high)
    assert inside.mean() >= 0.7
    assert (wide_high - wide_low > 1.5 * (high - low)).mean() > 0.5
    assert refits.se()["eta"] == pytest.approx(refits.values("eta").std(ddof=1))
    low, high = refits.interval()["eta"]
    assert low < found.params["eta"] < high


def test_leave_largest_out_predicts_runs_it_has_not_seen():
    runs = table("gadre") | {"flops": 6 * table("gadre")["params"] * table("gadre")["tokens"]}
    clean = fits.leave_largest_out(laws.GADRE, runs, num_starts=6)
    assert clean["held_out"] == 1
    assert clean["percent"] < 0.01
    runs["loss"][np.argmax(runs["flops"])] *= 1.05
    off = fits.leave_largest_out(laws.GADRE, runs, num_starts=6)
    assert off["percent"] == pytest.approx(100 * 0.05 / 1.05, rel=0.02)
    assert off["percent_above_irreducible"] > 2 * off["percent"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda runs: runs.pop("tokens"), "column='tokens' is not known"),
        (lambda runs: runs["loss"].__setitem__(0, -1.0), "column loss holds -1.0"),
        (lambda runs: runs.update(tables.take(runs, np.arange(3))), "4 parameters .* only 3 runs"),
    ],
)
def test_a_table_that_cannot_be_fitted_is_refused(change, words):
    runs = table("gadre")
    change(runs)
    with pytest.raises(ValueError, match=words):
        fits.fit(laws.GADRE, runs)


def test_an_unknown_fixed_parameter_is_refused():
    with pytest.raises(ValueError, match=r"gadre\.alpha is not an option"):
        fits.fit(laws.GADRE, table("gadre"), fits.Options(fixed={"alpha": 1.0}))
