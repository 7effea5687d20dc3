"""How many times the FLOPs one architecture needs for another's loss."""

import numpy as np
import pytest

from effarch.scaling import isoflop, multiplier


def curve(cheaper: float = 1.0, p: float = 0.08, *, budgets=(3e12, 1e13, 3e13, 1e14)):
    """L = 1 + 12 C^-p, reached with so many times fewer FLOPs."""
    flops = np.array(budgets)
    loss = 1 + 12 * (flops * cheaper) ** -p
    none = np.full(len(flops), np.nan)
    return isoflop.Vertices(flops, none, loss, none, dropped=())


@pytest.mark.parametrize("loss", [1.96, 2.0, 2.05])
def test_half_the_flops_is_a_multiplier_of_two(loss):
    found = multiplier.compute_multiplier(curve(2.0), curve(), loss)
    assert found == pytest.approx(2, rel=1e-4)
    assert multiplier.compute_multiplier(curve(), curve(2.0), loss) == pytest.approx(1 / found)


def test_it_depends_on_the_loss_where_the_exponents_differ():
    """(L - 1) / 12 = C^-p solved for both."""
    first, second, loss = curve(p=0.082), curve(p=0.08), 2.0
    wanted = (1 / 12) ** (1 / 0.082 - 1 / 0.08)
    found = multiplier.compute_multiplier(first, second, loss)
    assert found == pytest.approx(wanted, rel=1e-4)


def test_no_curve_is_extended():
    both = curve(2.0), curve()
    for loss in (both[0].loss.max() + 1e-3, both[1].loss.min() - 1e-3):
        with pytest.raises(ValueError, match=r"loss=\d\.\d+ is outside 1\.\d+ to 2\.\d+"):
            multiplier.compute_multiplier(*both, loss)
    with pytest.raises(ValueError, match=r"a curve with 2 budgets; .* needs 3 of each"):
        multiplier.compute_multiplier(curve(2.0, budgets=(1e13, 1e14)), curve(), 2.0)


def test_the_band_holds_the_multiplier_and_widens_with_the_noise():
    flops, factor = np.repeat((3e12, 1e13, 3e13, 1e14), 7), np.tile(np.geomspace(0.25, 4, 7), 4)

    def runs(cheaper):
        loss = 1 + 12 * (flops * cheaper) ** -0.08 + 0.05 * np.log(factor) ** 2
        return flops, factor * flops**0.5, loss

    widths = []
    for std in (0.001, 0.005):
        samples = [
            isoflop.resampled(*runs(cheaper), lambda x, s=std: np.full(len(x), s), seed=seed)
            for seed, cheaper in enumerate((2.0, 1.0))
        ]
        low, high = multiplier.band(*samples, 2.0)
        assert low < 2 < high
        widths.append(high - low)
    assert widths[0] < widths[1] / 2
    with pytest.raises(ValueError, match="no pair of resampled curves has 3 budgets"):
        multiplier.band([curve(budgets=(1e13, 1e14))], [curve()], 2.0)
