"""config.json and config.model: published values, what cannot be expressed, and the text of layers."""

import numpy as np
import pytest

from effarch import config
from effarch.convert import hf
from effarch.convert.hf import family, folder
from effarch.models.layers import rotary

GEMMA_2_2B = {  # the values of google/gemma-2-2b
    "model_type": "gemma2",
    "hidden_size": 2304,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "intermediate_size": 9216,
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000.0,
    "vocab_size": 256000,
}


YARN = ("factor", "original_max_position_embeddings", "mscale", "mscale_all_dim")


def read(content):
    return family.read_config(hf.of_config(content), content)


def test_gemma_2_2b():
    m = read(GEMMA_2_2B)
    assert (m.width, m.depth, m.layers) == (2304, 26, "local/glu + attention/glu")
    assert (m.norm.placement, m.tied_head, m.embed_scale) == ("peri", True, 48.0)
    assert m.blocks.local.window == 4096 and m.blocks.attention.window is None
    assert m.blocks.local.scale == m.blocks.attention.scale == 1 / 16
    assert (m.blocks.attention.softcap, m.logit_softcap) == (50.0, 30.0)
    assert m.blocks.glu.activation == "gelu_tanh"
    chosen, content = hf.of_model(m)
    assert chosen.model_type == "gemma2"
    assert {name: content[name] for name in GEMMA_2_2B} == GEMMA_2_2B
    assert content["layer_types"] == ["sliding_attention", "full_attention"] * 13


DEEPSEEK_V3 = {  # the values of deepseek-ai/DeepSeek-V3
    "model_type": "deepseek_v3",
    "hidden_size": 7168,
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "first_k_dense_replace": 3,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "n_group": 8,
    "topk_group": 4,
    "routed_scaling_factor": 2.5,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000,
    "rope_scaling": {
        "type": "yarn",
        "factor": 40,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
    },
    "vocab_size": 129280,
}


def test_deepseek_v3():
    m = read(DEEPSEEK_V3)
    assert m.layers == "first: 3*latent_attention/glu; repeat: latent_attention/moe"
    assert m.blocks.latent_attention.rope_yarn == (40, 32, 1, 4096, 1.0)
    chosen, content = hf.of_model(m)
    assert chosen.model_type == "deepseek_v3"
    wanted = dict(DEEPSEEK_V3)
    rope = wanted.pop("rope_scaling") | {"rope_type": "yarn"}
    rope.pop("type")  # as it was called before
    assert {name: content[name] for name in wanted} == wanted
    assert content["rope_scaling"] == rope
    assert content["rope_parameters"] == rope | {"rope_theta": 10000}


def test_a_model_of_ours_is_the_first_family_that_can_express_it():
    m = config.default().model
    m.vocab_size, m.width, m.blocks.glu.hidden = 64, 32, 40
    m.blocks.attention.num_heads = 2
    chosen, content = hf.of_model(m)
    assert chosen.model_type == "llama"
    assert (content["head_dim"], content["num_key_value_heads"]) == (16, 2)
    assert content["rope_parameters"] == {"rope_type": "default", "rope_theta": 10000.0}
    m.blocks.attention.qk_norm = True
    assert hf.of_model(m)[0].model_type == "qwen3"
    m.layers = "gated_delta_net/glu"
    assert hf.of_model(m)[0].model_type == "gated_deltanet"
    m.layers = "kda/glu"
    with pytest.raises(ValueError, match="no published family can express this model"):
        hf.of_model(m)
    m.layers, m.blocks.attention.window = "attention/glu", 8
    with pytest.raises(ValueError, match="llama models have no layers='local/glu'"):
        hf.of_model(m, "llama")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model_type": "gemma3"}, "Did you mean 'gemma2'"),
        ({"attention_bias": True}, "attention_bias=True is not supported for gemma2"),
        ({"rope_scaling": {"type": "longrope"}}, "'longrope' are not supported"),
        ({"hidden_activation": "gelu_new"}, "hidden_activation='gelu_new' is not one of silu"),
        ({"hidden_size": None}, "config.json has no hidden_size"),
        ({"hidden_size": "2304"}, "hidden_size='2304' is of the wrong type"),
        ({"layer_types": ["chunked_attention"]}, "layer_types='chunked_attention' is not known"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 is not supported for gemma2"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "have no low_freq_factor"),
        ({"rope_scaling": {"type": "yarn", "factor": 2}}, "type 'yarn' have no original_max"),
        ({"rope_scaling": {"type": "yarn", "mscale": 1.0}}, "mscale_all_dim=None"),
        (
            {"rope_scaling": dict(zip(YARN, (2.0, 64, 1.0, 1.0)), type="yarn")},
            "'yarn' are not supported for gemma2; supported: default",
        ),
        ({"rope_parameters": {"full_attention": {}}}, r"kinds of layers \(full_attention\)"),
    ],
)
def test_what_cannot_be_read_is_said(change, message):
    with pytest.raises(ValueError, match=message):
        read(GEMMA_2_2B | change)


def test_the_stretched_positions_of_llama_3_1_are_kept_and_written():
    scaling = dict(zip(("factor", "low_freq_factor", "high_freq_factor"), (8.0, 1.0, 4.0)))
    scaling |= {"original_max_position_embeddings": 8192}
    content = {"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 99}
    content |= {"num_attention_heads": 4, "intermediate_size": 96, "rope_theta": 5e5}
    m = read(content | {"rope_scaling": {"rope_type": "llama3", **scaling}})
    assert m.blocks.attention.rope_scaling == (8.0, 1.0, 4.0, 8192)
    chosen, again = hf.of_model(m)
    assert chosen.model_type == "llama" and "llama3_scaling" not in again
    wanted = {"rope_type": "llama3", "rope_theta": 5e5, **scaling}
    assert again["rope_parameters"] == wanted
    assert family.canonical(read(again)).to_dict() == family.canonical(m).to_dict()
    # the shortest waves stay, the longest are eight times as long, one in between
    frequencies = np.array([1.0, 2 * np.pi * 2 / 8192, 1e-5])
    got = rotary.stretched(frequencies, *m.blocks.attention.rope_scaling) / frequencies
    np.testing.assert_allclose(got, [1, 1 / 3 + 2 / 3 / 8, 1 / 8])


def test_quantized_weights_and_absent_files_are_said(tmp_path):
    with pytest.raises(ValueError, match=r"holds no config\.json"):
        folder.read_config(tmp_path)
    (tmp_path / "config.json").write_text('{"quantization_config": {"quant_method": "fp8"}}')
    with pytest.raises(ValueError, match="stored quantized"):
        folder.read_config(tmp_path)
    with pytest.raises(ValueError, match=r"no \*\.safetensors file"):
        folder.Tensors(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "x.safetensors"}}')
    with pytest.raises(ValueError, match=r"not there: x\.safetensors"):
        folder.Tensors(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match=r"index\.json has no weight_map"):
        folder.Tensors(tmp_path)
    for text, message in (("{", r"config\.json is damaged"), ("[1]", "holds a list, no object")):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            folder.read_config(tmp_path)


@pytest.mark.parametrize(
    "blocks, text",
    [
        (["a/b"] * 3, "a/b"),
        (["a/b", "a/b", "c/b"] * 2 + ["a/b"], "2*a/b + c/b"),
        (["a/b"] + ["a/c"] * 4, "first: a/b; repeat: a/c"),
        (["a/b", "c/b"] * 3 + ["a/b"], "a/b + c/b"),
    ],
)
def test_the_shortest_text_of_layers(blocks, text):
    assert family.layer_text(blocks) == text
