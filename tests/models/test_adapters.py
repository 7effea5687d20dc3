"""Low-rank adapters: where they are, that they add alpha / R x A B, and that they merge."""

import jax
import numpy as np
import pytest
from flax import nnx

from effarch import config
from effarch.models import build, layer_adapters
from effarch.models.context import Context
from effarch.models.layers import adapter
from effarch.models.layers.linear import Linear
from effarch.training import optimizers
from effarch.training import state as state_lib


def model_config(**lora):
    m = config.default().model
    m.width, m.depth, m.layers = 16, 2, "attention/none"
    m.blocks.attention.num_heads = 2
    m.lora.update(lora)
    return m


def test_a_model_with_adapters_is_the_merged_model():
    c = model_config(rank=2, alpha=6.0, paths=("layers/1/mixer/k", "layers/*/mixer/out"))
    tokens = np.random.default_rng(0).integers(0, 11, (2, 6)).astype(np.int32)

    @jax.jit
    def everything(key):
        plain = build.model(model_config(), vocab_size=11, rngs=nnx.Rngs(key))
        model = build.model(c, vocab_size=11, rngs=nnx.Rngs(key))
        for layer in adapter.linear_layers(model).values():
            if layer.adapter is not None:
                kernel = layer.adapter.up.kernel
                kernel[...] += 0.1 * jax.random.normal(key, kernel[...].shape)
        logits = model.logits(model(tokens, Context())[0])
        parts = nnx.to_pure_dict(nnx.state(model, nnx.Param))
        adapter.merge(model)
        merged = model.logits(model(tokens, Context())[0])
        after = nnx.to_pure_dict(nnx.state(model, nnx.Param))
        return logits, merged, nnx.to_pure_dict(nnx.state(plain)), parts, after

    logits, merged, plain, parts, after = jax.device_get(everything(jax.random.key(1)))
    np.testing.assert_allclose(merged, logits, atol=1e-5)
    (together,) = plain["layers"].values()  # without adapters both layers are one stack
    key = parts["layers"]["1"]["mixer"]["k"]
    np.testing.assert_allclose(key["kernel"][0], together["mixer"]["k"]["kernel"][1], rtol=1e-6)
    low = key["adapter"]["down"]["kernel"][0] @ key["adapter"]["up"]["kernel"][0]
    assert np.abs(low).max() > 1e-2
    wanted = key["kernel"][0] + 3.0 * low
    np.testing.assert_allclose(after["layers"]["1"]["mixer"]["k"]["kernel"][0], wanted, atol=1e-6)
    assert "adapter" not in parts["layers"]["0"]["mixer"]["k"]
    assert "adapter" in parts["layers"]["0"]["mixer"]["out"]


def test_only_adapters_are_trained_unless_rules_say_more():
    c = model_config(rank=2, paths=("layers/*/mixer/q",))
    plan = state_lib.blueprint(c, vocab_size=11)
    rules = (*layer_adapters.TRAINED, "final_norm/** frozen=0")
    groups = jax.tree.leaves(optimizers.groups.assign(plan.params, rules))
    trained = {group.path for group in groups if not group.is_frozen}
    assert trained == {
        "layers/0+1x2/mixer/q/adapter/down/kernel",
        "layers/0+1x2/mixer/q/adapter/up/kernel",
        "final_norm/scale",
    }


def test_a_pattern_that_matches_nothing_is_refused():
    c = model_config(rank=2, paths=("layers/*/mixer/z",))
    with pytest.raises(
        ValueError, match=r"paths\[0\]: 'layers/\*/mixer/z' matches no linear layer"
    ):
        build.abstract(c, vocab_size=11)


@pytest.mark.parametrize("by_outputs", [False, True])
def test_one_layer(by_outputs):
    """y = x (W + 4/2 A B), its matrix and the merged kernel, whichever way the kernel is kept."""

    @jax.jit
    def run(x):
        layer = Linear(3, 5, axes=("embed", "ffn"), by_outputs=by_outputs, rngs=nnx.Rngs(0))
        block = nnx.Dict(up=layer)
        adapter.attach(block, ("up",), rank=2, alpha=4.0, param_dtype=np.float32, rngs=nnx.Rngs(1))
        zero = layer.adapter.up.kernel[...]
        layer.adapter.up.kernel[...] = zero + 0.5
        parts = layer.kernel[...], layer.adapter.down.kernel[...], zero
        y, matrix = layer(x), layer.matrix()
        adapter.merge(block)
        return parts, y, matrix, layer.kernel[...]

    x = np.random.default_rng(0).standard_normal((4, 3), np.float32)
    (kernel, down, zero), y, matrix, merged = jax.device_get(run(x))
    assert not zero.any()
    wanted = (kernel.T if by_outputs else kernel) + 2.0 * down @ np.full((2, 5), 0.5)
    np.testing.assert_allclose(matrix, wanted, rtol=1e-5)
    np.testing.assert_allclose(merged, wanted.T if by_outputs else wanted, rtol=1e-5)
    np.testing.assert_allclose(y, x @ wanted, rtol=1e-4, atol=1e-6)
