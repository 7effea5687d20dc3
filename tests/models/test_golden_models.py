"""Small Llama and Qwen3 models against the logits of an independent implementation (PyTorch)."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from effarch import config
from effarch.models import build
from effarch.models.context import Context

pytestmark = pytest.mark.smoke

DATA = pathlib.Path(__file__).resolve().parent.parent / "data"

NAMES = {
    "self_attn.q_proj": "mixer/q/kernel",
    "self_attn.k_proj": "mixer/k/kernel",
    "self_attn.v_proj": "mixer/v/kernel",
    "self_attn.o_proj": "mixer/out/kernel",
    "self_attn.q_norm": "mixer/q_norm/scale",
    "self_attn.k_norm": "mixer/k_norm/scale",
    "mlp.gate_proj": "ffn/gate/kernel",
    "mlp.up_proj": "ffn/up/kernel",
    "mlp.down_proj": "ffn/down/kernel",
    "input_layernorm": "mixer_residual/norm_in/scale",
    "post_attention_layernorm": "ffn_residual/norm_in/scale",
}


def set_at(tree: dict, path: str, value):
    *parents, last = path.split("/")
    for name in parents:
        tree = tree[name]
    assert tree[last].shape == value.shape, path
    tree[last] = jnp.asarray(value)


def load(folder: pathlib.Path):
    """The model of a Hugging Face folder; every one of its arrays is used."""
    hf = json.loads((folder / "config.json").read_text())
    c = config.default().model
    c.width, c.depth, c.layers = hf["hidden_size"], hf["num_hidden_layers"], "attention/glu"
    c.tied_head, c.norm.eps = hf["tie_word_embeddings"], hf["rms_norm_eps"]
    c.blocks.attention.update(
        num_heads=hf["num_attention_heads"],
        num_kv_heads=hf["num_key_value_heads"],
        head_dim=hf["head_dim"],
        rope_theta=hf["rope_parameters"]["rope_theta"],
        qk_norm=hf["model_type"] == "qwen3",
    )
    c.blocks.glu.hidden = hf["intermediate_size"]
    model = build.model(c, vocab_size=hf["vocab_size"], rngs=nnx.Rngs(0))
    graphdef, state = nnx.split(model)
    params = nnx.to_pure_dict(state)
    arrays = safetensors.numpy.load_file(folder / "model.safetensors")
    set_at(params, "embed/table", arrays.pop("model.embed_tokens.weight"))
    set_at(params, "final_norm/scale", arrays.pop("model.norm.weight"))
    if "lm_head.weight" in arrays:
        set_at(params, "head/kernel", arrays.pop("lm_head.weight").T)
    (stack,) = params["layers"]
    stem = f"layers/{stack}"
    used = 0
    for theirs, ours in NAMES.items():
        keys = [f"model.layers.{layer}.{theirs}.weight" for layer in range(c.depth)]
        if keys[0] in arrays:
            stacked = np.stack([arrays[key].T for key in keys])
            set_at(params, f"{stem}/{ours}", stacked)
            used += len(keys)
    assert used == len(arrays)
    return nnx.merge(graphdef, params)


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_logits_equal_those_of_the_original(name):
    model = load(DATA / f"model_{name}")
    io = np.load(DATA / f"model_{name}" / "io.npz")
    graphdef, state = nnx.split(model)

    @jax.jit
    def logits(state, tokens):
        model = nnx.merge(graphdef, state)
        return model.logits(model(tokens, Context())[0])

    got = np.asarray(logits(state, io["input_ids"].astype(np.int32)))
    assert np.abs(got - io["logits"]).max() < 1e-4
    error = np.sqrt(np.mean((got - io["logits"]) ** 2) / np.mean(io["logits"] ** 2))
    assert error < 1e-5
