"""Gemma 2: arXiv 2408.00118. Local and global attention in turn, norms on both sides, soft caps.

Norms are kept as their difference from 1; the token table is scaled by sqrt(width) on the way in.
"""

from ml_collections import ConfigDict

from effarch import names
from effarch.convert.hf import common, mapping
from effarch.convert.hf.family import Family, blocks_of
from effarch.convert.hf.mapping import Rule

_NORMS = {
    "input_layernorm": "mixer_residual/norm_in",
    "post_attention_layernorm": "mixer_residual/norm_out",
    "pre_feedforward_layernorm": "ffn_residual/norm_in",
    "post_feedforward_layernorm": "ffn_residual/norm_out",
}


def _tensors(m: ConfigDict) -> list[Rule]:
    rules = common.outer(m, mapping.centered)
    for theirs, ours in common.numbered(m):
        rules += [
            mapping.centered(f"{theirs}.{name}.weight", f"{ours}/{own}/scale")
            for name, own in _NORMS.items()
        ]
        rules += common.attention(theirs, ours)
        rules += common.glu(f"{theirs}.mlp", f"{ours}/ffn")
    return rules


def _layers(hf: dict) -> list[str]:
    kinds = hf["layer_types"] or [
        "full_attention" if layer % 2 else "sliding_attention"
        for layer in range(hf["num_hidden_layers"])
    ]
    mixers = {"sliding_attention": "local", "full_attention": "attention"}
    field = "config.json: layer_types"
    return [f"{names.lookup(mixers, kind, field)}/glu" for kind in kinds]


def _read(hf: dict, m: ConfigDict) -> None:
    m.norm.placement = "peri"
    m.embed_scale = hf["hidden_size"] ** 0.5
    m.blocks.attention.softcap = hf["attn_logit_softcapping"]
    m.blocks.attention.scale = hf["query_pre_attn_scalar"] ** -0.5
    m.blocks.local = m.blocks.attention.copy_and_resolve_references()
    m.blocks.local.window = hf["sliding_window"]


def _write(m: ConfigDict, hf: dict) -> None:
    blocks = blocks_of(m)
    local = m.blocks.local if "local/glu" in blocks else m.blocks.attention
    if "attention/glu" not in blocks:
        for theirs, ours in common.ATTENTION_FIELDS.items():
            hf[theirs] = local[ours.rpartition(".")[2]]
    hf["attn_logit_softcapping"] = local.softcap
    scale = local.scale or hf["head_dim"] ** -0.5
    hf["query_pre_attn_scalar"] = round(scale**-2)
    hf["sliding_window"] = local.window or 4096
    hf["layer_types"] = [
        "sliding_attention" if block == "local/glu" else "full_attention" for block in blocks
    ]


FAMILY = Family(
    model_type="gemma2",
    architecture="Gemma2ForCausalLM",
    fields={
        **common.FIELDS,
        **common.ATTENTION_FIELDS,
        "intermediate_size": "blocks.glu.hidden",
        "hidden_activation": "blocks.glu.activation",
        "final_logit_softcapping": "logit_softcap",
    },
    defaults={
        **common.DEFAULTS,
        "hidden_activation": "gelu_pytorch_tanh",
        "tie_word_embeddings": True,
        "head_dim": 256,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "layer_types": None,
        "final_logit_softcapping": None,
        "attn_logit_softcapping": None,
    },
    fixed={"attention_bias": False},
    layers=_layers,
    tensors=_tensors,
    read=_read,
    write=_write,
)
