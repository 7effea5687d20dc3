"""Mixtral: arXiv 2401.04088. Llama with experts; they are called w1 (gate), w3 (up), w2 (down)."""

from ml_collections import ConfigDict

from effarch.convert.hf import common, mapping
from effarch.convert.hf.family import Family
from effarch.convert.hf.mapping import Rule


def _tensors(m: ConfigDict) -> list[Rule]:
    rules = common.outer(m)
    for theirs, ours in common.numbered(m):
        rules += common.norms(theirs, ours)
        rules += common.attention(theirs, ours)
        published, memory = f"{theirs}.block_sparse_moe", f"{theirs}.mlp"
        routed = f"{ours}/ffn/experts"
        count = m.blocks.moe.num_experts
        rules += common.experts(f"{published}.experts", routed, count, ("w1", "w3", "w2"))
        rules += mapping.merged_experts(f"{memory}.experts", routed)
        rules += [
            mapping.linear(f"{prefix}.gate.weight", f"{ours}/ffn/router/kernel")
            for prefix in (published, memory)
        ]
    return rules


def _mixer(m: ConfigDict) -> str:
    return "local" if "local/moe" in m.layers else "attention"


def _read(hf: dict, m: ConfigDict) -> None:
    if hf["sliding_window"]:
        m.blocks.local = m.blocks.attention.copy_and_resolve_references()
        m.blocks.local.window = hf["sliding_window"]


def _write(m: ConfigDict, hf: dict) -> None:
    section = m.blocks[_mixer(m)]
    hf["sliding_window"] = section.window
    for theirs, ours in common.ATTENTION_FIELDS.items():
        hf[theirs] = section[ours.rpartition(".")[2]]


FAMILY = Family(
    model_type="mixtral",
    architecture="MixtralForCausalLM",
    fields={
        **common.FIELDS,
        **common.ATTENTION_FIELDS,
        "intermediate_size": "blocks.moe.hidden",
        "hidden_act": "blocks.moe.activation",
        "num_local_experts": "blocks.moe.num_experts",
        "num_experts_per_tok": "blocks.moe.top_k",
    },
    defaults={
        **common.DEFAULTS,
        "rms_norm_eps": 1e-5,
        "num_key_value_heads": 8,
        "rope_theta": 1e6,
        "sliding_window": None,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
    },
    fixed={},
    layers=lambda hf: (
        [f"{'local' if hf['sliding_window'] else 'attention'}/moe"] * hf["num_hidden_layers"]
    ),
    tensors=_tensors,
    read=_read,
    write=_write,
)
