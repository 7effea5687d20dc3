"""Qwen3: arXiv 2505.09388. Llama with normed queries and keys."""

from ml_collections import ConfigDict

from effarch.convert.hf import common, mapping
from effarch.convert.hf.family import Family
from effarch.convert.hf.mapping import Rule


def qk_norms(theirs: str, ours: str, norm=mapping.same) -> list[Rule]:
    """The norms of queries and keys."""
    return [
        norm(f"{theirs}.self_attn.{name}.weight", f"{ours}/mixer/{name}/scale")
        for name in ("q_norm", "k_norm")
    ]


def _tensors(m: ConfigDict) -> list[Rule]:
    rules = common.outer(m)
    for theirs, ours in common.numbered(m):
        rules += common.norms(theirs, ours)
        rules += common.attention(theirs, ours)
        rules += qk_norms(theirs, ours)
        rules += common.glu(f"{theirs}.mlp", f"{ours}/ffn")
    return rules


def _read(hf: dict, m: ConfigDict) -> None:
    m.blocks.attention.qk_norm = True


FAMILY = Family(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    fields={**common.FIELDS, **common.ATTENTION_FIELDS, **common.GLU_FIELDS},
    defaults={**common.DEFAULTS, "head_dim": 128},
    fixed={"attention_bias": False, "use_sliding_window": False},
    layers=lambda hf: ["attention/glu"] * hf["num_hidden_layers"],
    tensors=_tensors,
    read=_read,
)
