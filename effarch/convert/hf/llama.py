"""Llama: arXiv 2302.13971, 2407.21783; also models that are Llamas by another name."""

from ml_collections import ConfigDict

from effarch.convert.hf import common
from effarch.convert.hf.family import Family
from effarch.convert.hf.mapping import Rule


def tensors(m: ConfigDict) -> list[Rule]:
    rules = common.outer(m)
    for theirs, ours in common.numbered(m):
        rules += common.norms(theirs, ours)
        rules += common.attention(theirs, ours)
        rules += common.glu(f"{theirs}.mlp", f"{ours}/ffn")
    return rules


FAMILY = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    fields={**common.FIELDS, **common.ATTENTION_FIELDS, **common.GLU_FIELDS},
    defaults=common.DEFAULTS,
    fixed={"attention_bias": False, "mlp_bias": False},
    layers=lambda hf: ["attention/glu"] * hf["num_hidden_layers"],
    tensors=tensors,
)
