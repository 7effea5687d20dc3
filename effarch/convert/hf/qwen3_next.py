"""Qwen3-Next: 3 layers of gated DeltaNet to one of gated attention, experts with a gated shared one.

Norms are kept as their difference from 1, that of gated DeltaNet's output is not. Its projections are
merged key head by key head: `in_proj_qkvz` holds q, k, the values and the output gates of a key head,
`in_proj_ba` its betas and decays; queries of attention are followed by their gate, head by head.
"""

import numpy as np
from ml_collections import ConfigDict

from effarch import names
from effarch.convert.hf import common, mapping, qwen3
from effarch.convert.hf.family import Family, blocks_of
from effarch.convert.hf.mapping import Rule

_ATTENTION, _DELTA = "attention", "gated_delta_net"


def _tensors(m: ConfigDict) -> list[Rule]:
    rules = common.outer(m, mapping.centered)
    for (theirs, ours), block in zip(common.numbered(m), blocks_of(m)):
        mixer, _, ffn = block.partition("/")
        rules += common.norms(theirs, ours, mapping.centered)
        if mixer == _ATTENTION:
            rules += _attention(theirs, ours, m.blocks[_ATTENTION])
        else:
            rules += _delta(f"{theirs}.linear_attn", f"{ours}/mixer", m.blocks[_DELTA])
        if ffn == "moe":
            rules += _moe(f"{theirs}.mlp", f"{ours}/ffn", m.blocks.moe)
        else:
            rules += common.glu(f"{theirs}.mlp", f"{ours}/ffn")
    return rules


def _attention(theirs: str, ours: str, options: ConfigDict) -> list[Rule]:
    def split(x):
        both = x.reshape(options.num_heads, 2, -1, x.shape[-1])
        return tuple(both[:, part].reshape(-1, x.shape[-1]).T for part in (0, 1))

    def join(q, gate):
        parts = [y.T.reshape(options.num_heads, 1, -1, y.shape[0]) for y in (q, gate)]
        return (np.concatenate(parts, axis=1).reshape(-1, q.shape[0]),)

    names = {"k_proj": "k", "v_proj": "v", "o_proj": "out"}
    merged = (f"{ours}/mixer/q/kernel", f"{ours}/mixer/gate/kernel")
    return [
        Rule((f"{theirs}.self_attn.q_proj.weight",), merged, split, join),
        *common.linears(f"{theirs}.self_attn", f"{ours}/mixer", names),
        *qwen3.qk_norms(theirs, ours, mapping.centered),
    ]


def _delta(theirs: str, ours: str, options: ConfigDict) -> list[Rule]:
    heads, ratio = options.num_heads, options.num_v_heads // options.num_heads
    k_dim, v_dim = options.head_dim, int(options.head_dim * options.expand_v)
    return [
        _merged(
            f"{theirs}.in_proj_qkvz.weight",
            [f"{ours}/{name}/kernel" for name in ("q", "k", "v", "gate")],
            heads,
            [k_dim, k_dim, ratio * v_dim, ratio * v_dim],
        ),
        _merged(
            f"{theirs}.in_proj_ba.weight",
            [f"{ours}/{name}/kernel" for name in ("beta", "decay")],
            heads,
            [ratio, ratio],
        ),
        _convs(f"{theirs}.conv1d.weight", ours, heads * k_dim),
        mapping.same(f"{theirs}.A_log", f"{ours}/rate/rate_log"),
        mapping.same(f"{theirs}.dt_bias", f"{ours}/rate/step_bias"),
        mapping.same(f"{theirs}.norm.weight", f"{ours}/out_norm/scale"),
        mapping.linear(f"{theirs}.out_proj.weight", f"{ours}/out/kernel"),
    ]


def _merged(theirs: str, ours: list[str], heads: int, sizes: list[int]) -> Rule:
    """Matrices side by side in every head: `sizes` are their outputs there."""
    ends = np.cumsum(sizes)[:-1]

    def split(x):
        parts = np.split(x.reshape(heads, -1, x.shape[-1]), ends, axis=1)
        return tuple(part.reshape(-1, x.shape[-1]).T for part in parts)

    def join(*parts):
        width = parts[0].shape[0]
        together = [part.T.reshape(heads, -1, width) for part in parts]
        return (np.concatenate(together, axis=1).reshape(-1, width),)

    return Rule((theirs,), tuple(ours), split, join)


def _convs(theirs: str, ours: str, keys: int) -> Rule:
    """The convolutions of q, k and v, channel after channel."""

    def split(x):
        return tuple(np.split(x[:, 0].T, [keys, 2 * keys], axis=1))

    def join(*parts):
        return (np.concatenate(parts, axis=1).T[:, None],)

    return Rule((theirs,), tuple(f"{ours}/conv/{name}" for name in "qkv"), split, join)


def _moe(theirs: str, ours: str, options: ConfigDict) -> list[Rule]:
    return [
        *common.moe(theirs, ours, options.num_experts, shared="shared_expert"),
        mapping.linear(f"{theirs}.shared_expert_gate.weight", f"{ours}/shared_gate/kernel"),
    ]


def _layers(hf: dict) -> list[str]:
    depth = hf["num_hidden_layers"]
    every = hf["full_attention_interval"]
    kinds = hf["layer_types"] or [
        "linear_attention" if (layer + 1) % every else "full_attention" for layer in range(depth)
    ]
    mixers = {"linear_attention": _DELTA, "full_attention": _ATTENTION}
    step, dense = hf["decoder_sparse_step"], set(hf["mlp_only_layers"])
    ffns = ["glu" if n in dense or (n + 1) % step else "moe" for n in range(depth)]
    field = "config.json: layer_types"
    return [f"{names.lookup(mixers, kind, field)}/{ffn}" for kind, ffn in zip(kinds, ffns)]


def _read(hf: dict, m: ConfigDict) -> None:
    keys, values = hf["linear_key_head_dim"], hf["linear_value_head_dim"]
    m.blocks[_DELTA].update(head_dim=keys, expand_v=values / keys, use_gate=True)
    m.blocks[_ATTENTION].update(qk_norm=True, use_gate=True)
    hidden, shared = hf["moe_intermediate_size"], hf["shared_expert_intermediate_size"]
    if shared % hidden:
        raise ValueError(
            f"config.json: shared_expert_intermediate_size={shared} is not a multiple of "
            f"moe_intermediate_size={hidden}, which is not supported."
        )
    m.blocks.moe.update(num_shared=shared // hidden, shared_gate=True)
    m.blocks.moe.router = "softmax_topk_renorm" if hf["norm_topk_prob"] else "softmax_topk"


def _write(m: ConfigDict, hf: dict) -> None:
    delta, moe = m.blocks[_DELTA], m.blocks.moe
    blocks = [block.split("/") for block in blocks_of(m)]
    hf["linear_key_head_dim"] = delta.head_dim
    hf["linear_value_head_dim"] = int(delta.head_dim * delta.expand_v)
    hf["shared_expert_intermediate_size"] = moe.num_shared * moe.hidden
    hf["norm_topk_prob"] = moe.router != "softmax_topk"
    hf["layer_types"] = [
        "linear_attention" if mixer == _DELTA else "full_attention" for mixer, _ in blocks
    ]
    hf["mlp_only_layers"] = [layer for layer, (_, ffn) in enumerate(blocks) if ffn == "glu"]
    hf["decoder_sparse_step"] = 1


FAMILY = Family(
    model_type="qwen3_next",
    architecture="Qwen3NextForCausalLM",
    fields={
        **common.FIELDS,
        **common.ATTENTION_FIELDS,
        **common.GLU_FIELDS,
        "partial_rotary_factor": "blocks.attention.rope_fraction",
        "linear_num_key_heads": f"blocks.{_DELTA}.num_heads",
        "linear_num_value_heads": f"blocks.{_DELTA}.num_v_heads",
        "linear_conv_kernel_dim": f"blocks.{_DELTA}.conv_size",
        "num_experts": "blocks.moe.num_experts",
        "num_experts_per_tok": "blocks.moe.top_k",
        "moe_intermediate_size": "blocks.moe.hidden",
    },
    defaults={
        **common.DEFAULTS,
        "head_dim": 256,
        "partial_rotary_factor": 0.25,
        "full_attention_interval": 4,
        "layer_types": None,
        "mlp_only_layers": [],
        "decoder_sparse_step": 1,
        "norm_topk_prob": True,
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 32,
        "intermediate_size": 5632,
        "moe_intermediate_size": 512,
        "shared_expert_intermediate_size": 512,
        "num_experts": 512,
        "num_experts_per_tok": 10,
    },
    fixed={"attention_bias": False},
    layers=_layers,
    tensors=_tensors,
    read=_read,
    write=_write,
    ignored=(r"^mtp\.",),
)
