"""Models of flash-linear-attention: DeltaNet, gated DeltaNet and gated linear attention."""

from ml_collections import ConfigDict

from effarch.convert.hf import common, mapping
from effarch.convert.hf.family import Family
from effarch.convert.hf.mapping import Rule

_FIELDS = {
    "hidden_size": "width",
    "num_hidden_layers": "depth",
    "tie_word_embeddings": "tied_head",
    "norm_eps": "norm.eps",
    "hidden_act": "blocks.glu.activation",
}
_DEFAULTS = {
    "tie_word_embeddings": False,
    "norm_eps": 1e-6,
    "hidden_act": "swish",
    "hidden_ratio": 4,
    "intermediate_size": None,
    "conv_size": 4,
}


def _outer(m: ConfigDict) -> list[Rule]:
    """All but the mixers."""
    rules = common.outer(m, embed="embeddings")
    for theirs, ours in common.numbered(m):
        rules += [
            mapping.same(f"{theirs}.attn_norm.weight", f"{ours}/mixer_residual/norm_in/scale"),
            mapping.same(f"{theirs}.mlp_norm.weight", f"{ours}/ffn_residual/norm_in/scale"),
            *common.glu(f"{theirs}.mlp", f"{ours}/ffn"),
        ]
    return rules


def _mixer(theirs: str, ours: str, names: dict[str, str], norm: tuple[str, ...], conv: bool):
    """Projections, convolutions and the norm of the output, whose name has changed with time."""
    projections = {"q_proj": "q", "k_proj": "k", "v_proj": "v", "o_proj": "out"}
    rules = common.linears(theirs, ours, {**projections, **names})
    rules += [mapping.same(f"{theirs}.{name}.weight", f"{ours}/out_norm/scale") for name in norm]
    if conv:
        rules += [
            mapping.conv(f"{theirs}.{name}_conv1d.weight", f"{ours}/conv/{name}") for name in "qkv"
        ]
    return rules


def _read_hidden(hf: dict, m: ConfigDict) -> None:
    """The library's own rule: hidden_ratio of the width, two thirds of it, in multiples of 256."""
    hidden = int(hf["hidden_size"] * hf["hidden_ratio"] * 2 / 3)
    m.blocks.glu.hidden = hf["intermediate_size"] or -(-hidden // 256) * 256


def _write_hidden(m: ConfigDict, hf: dict) -> None:
    hf["intermediate_size"] = m.blocks.glu.hidden
    hf["hidden_act"] = "swish" if hf["hidden_act"] == "silu" else hf["hidden_act"]


def _delta_net_tensors(m: ConfigDict) -> list[Rule]:
    rules, options = _outer(m), m.blocks.delta_net
    names = {"b_proj": "beta"} | ({"g_proj": "gate"} if options.use_gate else {})
    for theirs, ours in common.numbered(m):
        rules += _mixer(f"{theirs}.attn", f"{ours}/mixer", names, ("o_norm",), conv=True)
    return rules


def _read_delta_net(hf: dict, m: ConfigDict) -> None:
    _read_hidden(hf, m)
    if hf["expand_k"] != hf["expand_v"]:
        raise ValueError(
            f"config.json: expand_k={hf['expand_k']} and expand_v={hf['expand_v']} differ, which "
            "is not supported for delta_net."
        )
    m.blocks.delta_net.head_dim = int(hf["hidden_size"] * hf["expand_k"]) // hf["num_heads"]


def _write_delta_net(m: ConfigDict, hf: dict) -> None:
    _write_hidden(m, hf)
    options = m.blocks.delta_net
    hf["expand_k"] = hf["expand_v"] = options.num_heads * options.head_dim / m.width


DELTA_NET = Family(
    model_type="delta_net",
    architecture="DeltaNetForCausalLM",
    fields={
        **_FIELDS,
        "num_heads": "blocks.delta_net.num_heads",
        "conv_size": "blocks.delta_net.conv_size",
        "use_gate": "blocks.delta_net.use_gate",
        "allow_neg_eigval": "blocks.delta_net.allow_neg_eigval",
    },
    defaults={
        **_DEFAULTS,
        "use_gate": False,
        "allow_neg_eigval": False,
        "expand_k": 1.0,
        "expand_v": 1.0,
    },
    fixed={
        "attn": None,
        "use_short_conv": True,
        "use_beta": True,
        "use_output_norm": True,
        "qk_norm": "l2",
        "qk_activation": "silu",
    },
    layers=lambda hf: ["delta_net/glu"] * hf["num_hidden_layers"],
    tensors=_delta_net_tensors,
    read=_read_delta_net,
    write=_write_delta_net,
)


def _gated_tensors(m: ConfigDict) -> list[Rule]:
    rules, options = _outer(m), m.blocks.gated_delta_net
    names = {"a_proj": "decay", "b_proj": "beta"} | ({"g_proj": "gate"} if options.use_gate else {})
    for theirs, ours in common.numbered(m):
        rules += _mixer(f"{theirs}.attn", f"{ours}/mixer", names, ("o_norm",), conv=True)
        rules += [
            mapping.same(f"{theirs}.attn.A_log", f"{ours}/mixer/rate/rate_log"),
            mapping.same(f"{theirs}.attn.dt_bias", f"{ours}/mixer/rate/step_bias"),
        ]
    return rules


GATED_DELTA_NET = Family(
    model_type="gated_deltanet",
    architecture="GatedDeltaNetForCausalLM",
    fields={
        **_FIELDS,
        "num_heads": "blocks.gated_delta_net.num_heads",
        "num_v_heads": "blocks.gated_delta_net.num_v_heads",
        "head_dim": "blocks.gated_delta_net.head_dim",
        "expand_v": "blocks.gated_delta_net.expand_v",
        "conv_size": "blocks.gated_delta_net.conv_size",
        "use_gate": "blocks.gated_delta_net.use_gate",
        "allow_neg_eigval": "blocks.gated_delta_net.allow_neg_eigval",
    },
    defaults={
        **_DEFAULTS,
        "num_v_heads": None,
        "head_dim": 256,
        "num_heads": 6,
        "expand_v": 2.0,
        "use_gate": True,
        "allow_neg_eigval": False,
    },
    fixed={"attn": None, "use_short_conv": True},
    layers=lambda hf: ["gated_delta_net/glu"] * hf["num_hidden_layers"],
    tensors=_gated_tensors,
    read=_read_hidden,
    write=_write_hidden,
)


def _gla_tensors(m: ConfigDict) -> list[Rule]:
    rules = _outer(m)
    names = {"g_proj": "gate", "gk_proj.0": "decay/down", "gk_proj.1": "decay/up"}
    for theirs, ours in common.numbered(m):
        norms = ("g_norm_swish_gate", "g_norm")
        rules += _mixer(f"{theirs}.attn", f"{ours}/mixer", names, norms, conv=False)
        rules.append(mapping.same(f"{theirs}.attn.gk_proj.1.bias", f"{ours}/mixer/decay/up/bias"))
    return rules


def _read_gla(hf: dict, m: ConfigDict) -> None:
    _read_hidden(hf, m)
    if hf["num_kv_heads"] not in (None, hf["num_heads"]):
        raise ValueError(
            f"config.json: num_kv_heads={hf['num_kv_heads']} is not supported for gla; only "
            f"num_heads={hf['num_heads']} is."
        )


GLA = Family(
    model_type="gla",
    architecture="GLAForCausalLM",
    fields={
        **_FIELDS,
        "num_heads": "blocks.gla.num_heads",
        "expand_k": "blocks.gla.expand_k",
        "expand_v": "blocks.gla.expand_v",
    },
    defaults={**_DEFAULTS, "expand_k": 0.5, "expand_v": 1.0, "num_heads": 4, "num_kv_heads": None},
    fixed={
        "attn": None,
        "use_short_conv": False,
        "use_output_gate": True,
        "feature_map": None,
        "clamp_min": None,
        "elementwise_affine": True,
        "use_gk": True,
        "use_gv": False,
    },
    layers=lambda hf: ["gla/glu"] * hf["num_hidden_layers"],
    tensors=_gla_tensors,
    read=_read_gla,
    write=_write_hidden,
)
