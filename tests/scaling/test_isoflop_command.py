"""`python -m effarch.isoflop` on runs whose optima are known."""

import json
import re

import numpy as np
import pytest

from effarch import isoflop
from effarch.scaling import optima

FACTORS = np.geomspace(1 / 4, 4, 7)
HEADER = "run,flops_6nd,params_matmul,val/loss"


def rows(cheaper: float, *, noise: float = 0.0, seeds: int = 1, budgets=(1e13, 3e13, 1e14)):
    """N* = 0.1 C^0.5, least loss 1 + 12 C^-0.08 with so many times fewer FLOPs; off by 1 % of C."""
    draw = np.random.default_rng(int(10 * cheaper))
    return [
        (
            "run",
            flops * draw.uniform(0.99, 1.01),
            factor * 0.1 * flops**0.5,
            1
            + 12 * (flops * cheaper) ** -0.08
            + 0.05 * np.log(factor) ** 2
            + noise * draw.normal(),
        )
        for flops in budgets
        for factor in FACTORS
        for _ in range(seeds)
    ]


def write(folder, table, header=HEADER):
    folder.mkdir()
    lines = [",".join(map(str, row)) for row in table]
    path = folder / "results.csv"
    path.write_text("\n".join([header, *lines, "unfinished" + "," * header.count(",")]) + "\n")
    return str(path)


def test_two_sweeps_are_compared(tmp_path, capsys):
    attention = write(tmp_path / "attention", rows(1.0, noise=0.002, seeds=2))
    hybrid = write(tmp_path / "hybrid", rows(2.0, noise=0.002, seeds=2))
    figure = tmp_path / "isoflop.png"
    isoflop.main([hybrid, attention, f"--figure={figure}", "--resamples=40"])
    found = json.loads(capsys.readouterr().out)
    assert found["noise"] == pytest.approx(0.002, rel=0.3)
    for name in ("attention", "hybrid"):
        one = found["architectures"][name]
        assert len(one["budgets"]) == 3 and one["budgets_without_an_optimum"] == []
        assert one["exponent"] == pytest.approx(0.5, abs=0.05)
        low, high = one["exponent_95"]
        assert low < 0.5 < high < low + 0.2
    savings = found["flops_for_the_loss_over_hybrid"]["attention"]
    assert len(savings) == 2  # the third loss is above all that the hybrid had
    for saving in savings:
        assert saving["band"][0] < 2 < saving["band"][1]
    assert figure.stat().st_size > 10_000


def test_without_noise_there_are_no_bands(tmp_path, capsys):
    table = [(run, c, n, loss, n / 2) for run, c, n, loss in rows(1.0, budgets=(1e13, 1e14))]
    path = write(tmp_path / "one", table, f"{HEADER},body")
    isoflop.main([path])
    one = json.loads(capsys.readouterr().out)["architectures"]["one"]
    assert one["exponent"] == pytest.approx(0.5, abs=0.01) and "exponent_95" not in one
    isoflop.main([path, "--columns=size=body", "--noise=0.01", "--resamples=20"])
    half = json.loads(capsys.readouterr().out)["architectures"]["one"]
    assert half["budgets"][0]["size"] == pytest.approx(one["budgets"][0]["size"] / 2)
    assert "exponent_95" in half


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--columns=size=sise"], r"column='sise' is not known\. Known: flops_6nd"),
        (["--columns=sise=run"], r"--columns\.sise is not an option\..*Did you mean 'size'"),
        (["--columns=size=run"], "column run holds text"),
        (["--min_side=0"], "--min_side=0 and .* must be at least 1"),
        (["nowhere.csv"], "nowhere.csv"),
    ],
)
def test_mistakes_are_one_sentence(tmp_path, capsys, arguments, words):
    path = write(tmp_path / "one", rows(1.0))
    with pytest.raises(SystemExit) as stopped:
        isoflop.main([path, *arguments])
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and re.search(words, said)


def test_seeds_are_averaged():
    flops, size = np.array([1.0, 1.0, 1.0, 2.0]), np.array([5.0, 5.0, 6.0, 5.0])
    runs = {"flops": flops, "size": size, "loss": np.array([3.0, 3.2, 4.0, 2.0])}
    found, noise = optima.find({"one": runs, "other": runs}, resamples=3)
    np.testing.assert_allclose(found["one"].runs["loss"], [3.1, 4.0, 2.0])
    np.testing.assert_allclose(found["one"].runs["size"], [5.0, 6.0, 5.0])
    assert noise == pytest.approx(np.std([3.0, 3.2], ddof=1))
    assert len(found["other"].resampled) == 3
    alone, noise = optima.find({"one": {name: x[1:] for name, x in runs.items()}})
    assert noise is None and alone["one"].resampled == []
