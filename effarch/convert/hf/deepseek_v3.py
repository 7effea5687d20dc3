"""DeepSeek-V3: arXiv 2412.19437. Latent attention, sigmoid routing within groups, shared experts.

Rotary channels come in neighbouring pairs there and in halves here; q and k are reordered alike.
Positions are plain (Moonlight-16B) or stretched by YaRN (DeepSeek-V3).
"""

import numpy as np
from ml_collections import ConfigDict

from effarch.convert.hf import common, mapping, positions
from effarch.convert.hf.family import Family, blocks_of
from effarch.convert.hf.mapping import Rule

_MIXER = "latent_attention"


def _tensors(m: ConfigDict) -> list[Rule]:
    rules = common.outer(m)
    for (theirs, ours), block in zip(common.numbered(m), blocks_of(m)):
        rules += common.norms(theirs, ours)
        rules += _attention(f"{theirs}.self_attn", f"{ours}/mixer", m.blocks[_MIXER])
        if block.endswith("/moe"):
            rules += _moe(f"{theirs}.mlp", f"{ours}/ffn", m.blocks.moe)
        else:
            rules += common.glu(f"{theirs}.mlp", f"{ours}/ffn")
    return rules


def _attention(theirs: str, ours: str, options: ConfigDict) -> list[Rule]:
    rope = options.rope_dim
    names = {"kv_b_proj": "up", "o_proj": "out"}
    rules = common.linears(theirs, ours, names)
    rules += [
        _halves(f"{theirs}.kv_a_proj_with_mqa.weight", f"{ours}/down/kernel", 1, rope),
        mapping.same(f"{theirs}.kv_a_layernorm.weight", f"{ours}/latent_norm/scale"),
    ]
    query = "q_b_proj" if options.q_latent_dim else "q_proj"
    rules.append(_halves(f"{theirs}.{query}.weight", f"{ours}/q/kernel", options.num_heads, rope))
    if options.q_latent_dim:
        rules += [
            mapping.linear(f"{theirs}.q_a_proj.weight", f"{ours}/q_down/kernel"),
            mapping.same(f"{theirs}.q_a_layernorm.weight", f"{ours}/q_norm/scale"),
        ]
    return rules


def _halves(theirs: str, ours: str, heads: int, rope: int) -> Rule:
    """A matrix whose last `rope` outputs of each head are rotary channels."""
    order = np.concatenate([np.arange(0, rope, 2), np.arange(1, rope, 2)])

    def reordered(x, order):
        y = x.reshape(heads, -1, x.shape[-1])
        plain = y.shape[1] - rope
        return np.concatenate([y[:, :plain], y[:, plain:][:, order]], axis=1).reshape(x.shape)

    def to_ours(x):
        return (reordered(x, order).T,)

    def to_theirs(x):
        return (reordered(np.ascontiguousarray(x.T), np.argsort(order)),)

    return Rule((theirs,), (ours,), to_ours, to_theirs)


def _moe(theirs: str, ours: str, options: ConfigDict) -> list[Rule]:
    return [
        *common.moe(theirs, ours, options.num_experts, shared="shared_experts"),
        mapping.same(f"{theirs}.gate.e_score_correction_bias", f"{ours}/router/bias"),
    ]


def _layers(hf: dict) -> list[str]:
    depth, dense = hf["num_hidden_layers"], hf["first_k_dense_replace"]
    return [f"{_MIXER}/{'glu' if layer < dense else 'moe'}" for layer in range(depth)]


def _read(hf: dict, m: ConfigDict) -> None:
    m.blocks.moe.router = "sigmoid_bias"


def _write(m: ConfigDict, hf: dict) -> None:
    hf["first_k_dense_replace"] = sum(block.endswith("/glu") for block in blocks_of(m))
    hf["num_key_value_heads"] = hf["num_attention_heads"]


FAMILY = Family(
    model_type="deepseek_v3",
    architecture="DeepseekV3ForCausalLM",
    fields={
        **common.FIELDS,
        **common.GLU_FIELDS,
        "num_attention_heads": f"blocks.{_MIXER}.num_heads",
        "q_lora_rank": f"blocks.{_MIXER}.q_latent_dim",
        "kv_lora_rank": f"blocks.{_MIXER}.latent_dim",
        "qk_nope_head_dim": f"blocks.{_MIXER}.nope_dim",
        "qk_rope_head_dim": f"blocks.{_MIXER}.rope_dim",
        "v_head_dim": f"blocks.{_MIXER}.v_dim",
        "rope_theta": f"blocks.{_MIXER}.rope_theta",
        positions.YARN: f"blocks.{_MIXER}.rope_yarn",
        "n_routed_experts": "blocks.moe.num_experts",
        "n_shared_experts": "blocks.moe.num_shared",
        "num_experts_per_tok": "blocks.moe.top_k",
        "moe_intermediate_size": "blocks.moe.hidden",
        "n_group": "blocks.moe.num_groups",
        "topk_group": "blocks.moe.top_groups",
        "routed_scaling_factor": "blocks.moe.routed_scaling",
    },
    defaults={
        **common.DEFAULTS,
        positions.YARN: (),
        "q_lora_rank": None,
        "first_k_dense_replace": 3,
    },
    fixed={
        "attention_bias": False,
        "norm_topk_prob": True,
        "rope_interleave": True,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "moe_layer_freq": 1,
    },
    layers=_layers,
    tensors=_tensors,
    read=_read,
    write=_write,
    ignored=(r"^model\.layers\.DEPTH\.",),  # predicts further tokens
)
