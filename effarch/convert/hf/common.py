"""What most families share: the names of Llama."""

from ml_collections import ConfigDict

from effarch.convert.hf import mapping, positions
from effarch.convert.hf.mapping import Rule

FIELDS = {
    "hidden_size": "width",
    "num_hidden_layers": "depth",
    "tie_word_embeddings": "tied_head",
    "rms_norm_eps": "norm.eps",
}
ATTENTION_FIELDS = {
    "num_attention_heads": "blocks.attention.num_heads",
    "num_key_value_heads": "blocks.attention.num_kv_heads",
    "head_dim": "blocks.attention.head_dim",
    "rope_theta": "blocks.attention.rope_theta",
    positions.LLAMA3: "blocks.attention.rope_scaling",
}
GLU_FIELDS = {"intermediate_size": "blocks.glu.hidden", "hidden_act": "blocks.glu.activation"}
DEFAULTS = {
    "tie_word_embeddings": False,
    "rms_norm_eps": 1e-6,
    "num_key_value_heads": None,
    "head_dim": None,
    "rope_theta": 10000.0,
    positions.LLAMA3: (),
    "hidden_act": "silu",
}

IGNORED = (r"rotary_emb\.inv_freq$",)
"""Constants that some files hold."""


def ignored(m: ConfigDict, extra: tuple[str, ...] = ()) -> tuple[str, ...]:
    """Names that are no part of the model; a tied head is written by some.

    DEPTH in `extra` is the number of layers.
    """
    extra = tuple(pattern.replace("DEPTH", str(m.depth)) for pattern in extra)
    return (*IGNORED, *extra, *((r"^lm_head\.weight$",) if m.tied_head else ()))


def outer(m: ConfigDict, norm=mapping.same, embed: str = "embed_tokens") -> list[Rule]:
    """The token table, the last norm and the head."""
    rules = [
        mapping.same(f"model.{embed}.weight", "embed/table"),
        norm("model.norm.weight", "final_norm/scale"),
    ]
    if not m.tied_head:
        rules.append(mapping.linear("lm_head.weight", "head/kernel"))
    return rules


def norms(theirs: str, ours: str, norm=mapping.same) -> list[Rule]:
    """The norms before mixer and ffn."""
    return [
        norm(f"{theirs}.input_layernorm.weight", f"{ours}/mixer_residual/norm_in/scale"),
        norm(f"{theirs}.post_attention_layernorm.weight", f"{ours}/ffn_residual/norm_in/scale"),
    ]


def attention(theirs: str, ours: str) -> list[Rule]:
    """The four projections."""
    names = {"q_proj": "q", "k_proj": "k", "v_proj": "v", "o_proj": "out"}
    return linears(f"{theirs}.self_attn", f"{ours}/mixer", names)


def glu(theirs: str, ours: str) -> list[Rule]:
    """gate_proj, up_proj and down_proj."""
    return linears(theirs, ours, {f"{name}_proj": name for name in ("gate", "up", "down")})


def linears(theirs: str, ours: str, names: dict[str, str]) -> list[Rule]:
    """Linear layers by their name and ours."""
    return [
        mapping.linear(f"{theirs}.{name}.weight", f"{ours}/{own}/kernel")
        for name, own in names.items()
    ]


def experts(theirs: str, ours: str, num_experts: int, names: tuple[str, str, str]) -> list[Rule]:
    """The matrices of the experts; `names` are those of gate, up and down of one expert."""
    return [
        mapping.experts(f"{theirs}.{{expert}}.{name}.weight", f"{ours}/{own}", num_experts)
        for name, own in zip(names, ("gate", "up", "down"))
    ]


def moe(theirs: str, ours: str, num_experts: int, *, shared: str) -> list[Rule]:
    """Router, experts (one by one, or in one tensor) and shared experts, which they call `shared`."""
    names = ("gate_proj", "up_proj", "down_proj")
    return [
        mapping.linear(f"{theirs}.gate.weight", f"{ours}/router/kernel"),
        *experts(f"{theirs}.experts", f"{ours}/experts", num_experts, names),
        *mapping.merged_experts(f"{theirs}.experts", f"{ours}/experts"),
        *glu(f"{theirs}.{shared}", f"{ours}/shared"),
    ]


def numbered(m: ConfigDict) -> list[tuple[str, str]]:
    """The name of each layer, theirs and ours."""
    return [(f"model.layers.{layer}", f"layers/{layer}") for layer in range(m.depth)]
