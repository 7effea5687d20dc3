"""What rounding does to each layer: against numpy on one layer, and in the records of a run."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effarch.quantization import diagnostics, matmul, recipes
from effarch.training import (
    loop,
    report_rounding,
    report_runs,
    rounding_metrics,
    run_folder,
    setup,
    writers,
)

T, I, O = 64, 32, 64


def gaussian(*shape, seed):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


X, W, E = gaussian(T, I, seed=0), gaussian(I, O, seed=1), gaussian(T, O, seed=2)
E[3] *= 1e-6  # what a scale of the whole tensor loses


@jax.jit
def seen(x, w, e):
    """Of two recipes, each beside its product."""

    def one(recipe):
        def product(x, w, probe):
            y = matmul.quantized_matmul(x, w, recipe, dtype=jnp.float32)
            return diagnostics.observe(
                recipe, y, probe, diagnostics.forward(recipe, x, w), None, None
            )

        y, vjp = jax.vjp(product, x, w, jnp.zeros(len(diagnostics.NAMES)))
        return y, *vjp(e)

    plain = recipes.fp8_current(), recipes.mxfp4(), recipes.quest(bits=2, rotate=32)
    return [one(recipe) for recipe in plain]


def test_figures_of_a_layer_by_numpy():
    fp8, mx, quest = (dict(zip(diagnostics.NAMES, one[-1])) for one in seen(X, W, E))

    def error(values, exact):
        return np.linalg.norm(values - exact) / np.linalg.norm(exact)

    e = np.float32(np.abs(E).max() / 57344)
    rounded = (E / e).astype(jnp.float8_e5m2).astype(np.float32) * e
    assert fp8["e_error"] == pytest.approx(error(rounded, E), rel=1e-3)
    assert fp8["e_underflow"] == np.mean((rounded == 0) & (E != 0)) == pytest.approx(0, abs=0.02)
    assert fp8["x_clipped"] == fp8["w_clipped"] == fp8["e_clipped"] == 0

    grid = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    for name, array in (("x", X), ("w", W.T), ("e", E)):
        blocks = array.reshape(-1, 32)
        scale = 2.0 ** (np.floor(np.log2(np.abs(blocks).max(1, keepdims=True))) - 2)
        share = np.abs(blocks) / scale
        values = np.sign(blocks) * grid[np.abs(share[..., None] - grid).argmin(-1)] * scale
        assert mx[f"{name}_error"] == pytest.approx(error(values, blocks), rel=1e-4)
        assert mx[f"{name}_clipped"] == pytest.approx(np.mean(share > 6)) and mx["x_clipped"] > 0
    assert mx["e_underflow"] == pytest.approx(np.mean((values == 0) & (blocks != 0)))

    hadamard = np.array([[(-1) ** bin(i & j).count("1") for j in range(32)] for i in range(32)])
    h = X @ hadamard / np.sqrt(32)
    end = 1.4935346 * np.sqrt(np.mean(h * h, axis=1, keepdims=True))
    step = 2 * end / 3
    values = (np.round(np.clip(h, -end, end) / step + 0.5) - 0.5) * step
    assert quest["x_error"] == pytest.approx(error(values, h), rel=1e-3)
    assert quest["x_clipped"] == pytest.approx(np.mean(np.abs(h) > end + step / 2), abs=1e-3)
    assert quest["e_error"] == quest["e_underflow"] == 0


def test_observing_changes_no_result():
    _, dx, dw, _ = seen(X, W, E)[1]
    plain = jax.jit(
        lambda x, w, e: jax.vjp(
            lambda x, w: matmul.quantized_matmul(x, w, recipes.mxfp4(), dtype=jnp.float32), x, w
        )[1](e)
    )
    for one, other in zip((dx, dw), plain(X, W, E)):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_a_run_records_and_draws_them(make_tiny, tmp_path):
    config = make_tiny()
    config.model.width = 32
    config.quantization.rules = ("layers/0/** mxfp4", "layers/1/ffn/up quartet")
    config.quantization.metrics_every = 6
    plan = setup.prepare(config)
    run_folder.create(tmp_path / "run", plan.config, data=plan.dataset.fingerprint)
    loop.Loop(plan, tmp_path / "run").run()
    records = writers.read_metrics(tmp_path / "run", "rounding")
    assert [record["step"] for record in records] == [6, 12]
    for record in records:
        paths = {name.rpartition("/")[0] for name in record if "/" in name}
        assert {path for path in paths if path.startswith("layers/1")} == {"layers/1/ffn/up"}
        assert "layers/0/ffn/down" in paths
        for path in paths:
            row = {name: record[f"{path}/{name}"] for name in rounding_metrics.NAMES}
            assert 0.05 < row["x_error"] < 0.3 and 0.05 < row["e_error"] < 0.5
            assert 0.3 < row["cosine"] < 0.9999
    (run,) = report_runs.read_runs([tmp_path / "run"])
    panels = {panel.title: panel for panel in report_rounding.panels([run])}
    found = panels["Gradient against the one without rounding"]
    assert [curve.label for curve in found.curves] == ["layer 0", "layer 1"]
    first = np.mean([v for k, v in records[0].items() if "layers/0/" in k and "cosine" in k])
    assert found.curves[0].values[0] == pytest.approx(first)
