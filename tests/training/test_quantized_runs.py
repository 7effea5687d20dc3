"""A run with recipes: plain start and tail, stopped and resumed, stochastic rounding and statistics."""

import jax
import numpy as np
import pytest

from effarch.models.layers import quantizer
from effarch.training import loop, restore, run_folder, setup, writers

pytestmark = pytest.mark.slow


def train(config, folder):
    plan = setup.prepare(config)
    run_folder.create(folder, plan.config, data=plan.dataset.fingerprint)
    return plan, loop.Loop(plan, folder).run()


def losses(folder):
    return [line["loss"] for line in writers.read_metrics(folder, "train")]


class PowerCut(Exception):
    pass


def cut_at(monkeypatch, step):
    """Ends the run without a word when the metrics of a step are read."""
    original = loop.Loop._read

    def read(self, read_step, metrics, stop):
        if read_step == step:
            raise PowerCut
        original(self, read_step, metrics, stop)

    monkeypatch.setattr(loop.Loop, "_read", read)


def test_a_quantized_run_resumes_bit_for_bit(make_tiny, tmp_path, monkeypatch):
    """Layer 0 with delayed scales, layer 1 with stochastic rounding; 2 plain steps at both ends.

    FP8 copies for the backward pass, moments of low rank with error feedback.
    """
    plain, rounded = make_tiny(), make_tiny()
    for config in (plain, rounded):
        config.model.width = 32
        config.optimizer.kind = "dct_adamw"
        config.optimizer.dct_adamw.update(rank=8, error_feedback=True)
    rounded.quantization.saved_group = 16
    rounded.quantization.rules = ("layers/0/** fp8_delayed history=3", "layers/1/** quartet")
    rounded.quantization.start_step = rounded.quantization.tail_steps = 2

    _, whole = train(rounded, tmp_path / "whole")
    with monkeypatch.context() as patch, pytest.raises(PowerCut):
        cut_at(patch, 7)
        train(rounded, tmp_path / "cut")
    plan, resumed = train(rounded, tmp_path / "cut")
    assert resumed.resumes == 1
    assert losses(tmp_path / "whole") == losses(tmp_path / "cut")
    jax.tree.map(np.testing.assert_array_equal, whole.state, resumed.state)
    largest = jax.tree_util.tree_leaves_with_path(whole.state.model_state)
    assert all((np.asarray(leaf) > 0).any() for _, leaf in largest)

    train(plain, tmp_path / "plain")
    one, other = losses(tmp_path / "plain"), losses(tmp_path / "whole")
    # A loss is that before its step's update: the third is the first that rounding changes.
    np.testing.assert_allclose(one[:2], other[:2], rtol=1e-6)
    assert abs(one[2] - other[2]) > 1e-6
    assert other[-1] < other[0] - 0.1

    # After its plain tail the model is a plain one.
    assert not plan.is_model_quantized(12) and plan.is_model_quantized(10)
    model = restore.model_of(plan, resumed.state)
    assert not any(layer.quantizer for layer in quantizer.linear_layers(model).values())
