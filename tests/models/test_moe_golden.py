"""Mixtral and DeepSeek-V3 blocks and a small Mixtral against an independent implementation (PyTorch)."""

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
from effarch.models.ffns.moe import Moe

DATA = pathlib.Path(__file__).resolve().parent.parent / "data"


def experts_of(gate_up, down) -> dict:
    """[E, 2 F, D] with the gate first and [E, D, F] -> ours, transposed."""
    gate, up = np.split(gate_up, 2, axis=1)
    return {
        "gate": gate.swapaxes(1, 2),
        "up": up.swapaxes(1, 2),
        "down": down.swapaxes(1, 2),
    }


def empty(make):
    """The static part of a module and arrays of zeros to fill in; nothing is initialized."""
    graphdef, state = nnx.split(nnx.eval_shape(make))
    return graphdef, jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), nnx.to_pure_dict(state))


def put(tree: dict, new: dict) -> None:
    for name, value in new.items():
        if isinstance(value, dict):
            put(tree[name], value)
        else:
            assert tree[name].shape == value.shape, name
            tree[name] = jnp.asarray(value)


def block(data, **options):
    """The Moe with the file's weights, as a jitted function."""
    num_experts, width, hidden = data["param:experts.down_proj"].shape
    graphdef, params = empty(
        lambda: Moe(width, num_experts=num_experts, hidden=hidden, rngs=nnx.Rngs(0), **options)
    )
    router = {"kernel": data["param:gate.weight"].T}
    if "param:gate.e_score_correction_bias" in data:
        router["bias"] = data["param:gate.e_score_correction_bias"]
    new = {"router": router}
    new["experts"] = experts_of(data["param:experts.gate_up_proj"], data["param:experts.down_proj"])
    if "param:shared_experts.up_proj.weight" in data:
        new["shared"] = {
            name: {"kernel": data[f"param:shared_experts.{name}_proj.weight"].T}
            for name in ("gate", "up", "down")
        }
    put(params, new)
    return jax.jit(lambda x: nnx.merge(graphdef, params)(x, Context())[0])


BLOCKS = {
    "mixtral": dict(top_k=2),
    "deepseek_v3": dict(
        top_k=4,
        num_shared=1,
        router="sigmoid_bias",
        num_groups=4,
        top_groups=2,
        routed_scaling=2.5,
    ),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_outputs_equal_those_of_the_original(name):
    data = np.load(DATA / f"moe_{name}.npz")
    got = block(data, **BLOCKS[name])(data["x"])
    assert np.abs(got - data["o"]).max() < 1e-5 * np.abs(data["o"]).max()


def load_mixtral(folder: pathlib.Path):
    hf = json.loads((folder / "config.json").read_text())
    c = config.default().model
    c.width, c.depth, c.layers = hf["hidden_size"], hf["num_hidden_layers"], "attention/moe"
    c.tied_head, c.norm.eps = hf["tie_word_embeddings"], hf["rms_norm_eps"]
    c.blocks.attention.update(
        num_heads=hf["num_attention_heads"],
        num_kv_heads=hf["num_key_value_heads"],
        rope_theta=hf["rope_parameters"]["rope_theta"],
    )
    c.blocks.moe.update(
        num_experts=hf["num_local_experts"],
        top_k=hf["num_experts_per_tok"],
        hidden=hf["intermediate_size"],
    )
    vocab_size = hf["vocab_size"]
    graphdef, params = empty(lambda: build.model(c, vocab_size=vocab_size, rngs=nnx.Rngs(0)))
    arrays = safetensors.numpy.load_file(folder / "model.safetensors")
    (stack,) = params["layers"]

    def layers(name, change=np.transpose):
        return np.stack([change(arrays.pop(f"model.layers.{n}.{name}")) for n in range(c.depth)])

    parts = [
        experts_of(*pair)
        for pair in zip(
            layers("mlp.experts.gate_up_proj", np.asarray),
            layers("mlp.experts.down_proj", np.asarray),
        )
    ]
    new = {
        "mixer": {
            ours: {"kernel": layers(f"self_attn.{theirs}_proj.weight")}
            for ours, theirs in (("q", "q"), ("k", "k"), ("v", "v"), ("out", "o"))
        },
        "ffn": {
            "router": {"kernel": layers("mlp.gate.weight")},
            "experts": {
                name: np.stack([part[name] for part in parts]) for name in ("gate", "up", "down")
            },
        },
        "mixer_residual": {"norm_in": {"scale": layers("input_layernorm.weight")}},
        "ffn_residual": {"norm_in": {"scale": layers("post_attention_layernorm.weight")}},
    }
    put(params["layers"][stack], new)
    put(
        params,
        {
            "embed": {"table": arrays.pop("model.embed_tokens.weight")},
            "final_norm": {"scale": arrays.pop("model.norm.weight")},
            "head": {"kernel": arrays.pop("lm_head.weight").T},
        },
    )
    assert not arrays
    return graphdef, params


def test_logits_of_a_small_mixtral():
    graphdef, params = load_mixtral(DATA / "model_mixtral")
    io = np.load(DATA / "model_mixtral" / "io.npz")

    @jax.jit
    def logits(params, tokens):
        model = nnx.merge(graphdef, params)
        return model.logits(model(tokens, Context())[0])

    got = np.asarray(logits(params, io["input_ids"].astype(np.int32)))
    assert np.abs(got - io["logits"]).max() < 1e-4
    error = np.sqrt(np.mean((got - io["logits"]) ** 2) / np.mean(io["logits"] ** 2))
    assert error < 1e-5
