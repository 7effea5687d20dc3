"""Published hybrids of recurrent mixers and softmax attention, at one set of sizes.

    python -m effarch.train --config=configs/hybrids.py:model=gdn_h1
    python -m effarch.train --config=configs/hybrids.py:model=study,mixer=hgrn2,ratio=6,size=340m
    python -m effarch.train --config=configs/hybrids.py:model=kimi_linear,size=1.3b,on=v6e-64

`study` is the hybrid study's grid, arXiv 2507.06457: `ratio` recurrent layers to one of full attention
(24, 12, 6 or 3 there), 0 for none. A depth of 24 has then 1, 2, 3 or 6 layers of full attention, evenly
placed; the study does not say where. Gated DeltaNet has 21 layers for 24, as published, because its
mixer has half as many parameters again: the budget is equal. The other patterns are those of their
papers with dense feed-forwards and our widths and head sizes, so that what differs between two of them
is the pattern.
"""

from effarch import config, names
from effarch.configs import machines, recipes

MODELS = {
    "study": "",  # made from `mixer` and `ratio`
    "deltanet_swa": "delta_net/glu + local/glu",  # arXiv 2406.06484
    "deltanet_global": "",  # the same paper: two layers of full attention, by number
    "gdn_h1": "gated_delta_net/glu + local/glu",  # arXiv 2412.06464
    "gdn_h2": "mamba2/glu + gated_delta_net/glu + local/glu",
    "qwen3_next": "3*gated_delta_net/glu + gated_attention/glu",
    "kimi_linear": "3*kda/glu + latent_attention/glu",  # arXiv 2510.26692
    "olmo_hybrid": "3*gated_delta_net/glu + attention/glu",  # arXiv 2604.03444
}
STUDIED = ("delta_net", "gated_delta_net", "gla", "hgrn", "hgrn2", "retnet")
#        width depth, width of recurrent heads, heads of gated DeltaNet and their key width
SIZES = {
    "tiny": (128, 8, 32, 2, 48),
    "340m": (1024, 24, 128, 6, 128),
    "1.3b": (2048, 24, 128, 6, 256),
}


def get_config(arg=""):
    switches = config.parse_arg(
        arg, model="study", mixer="gated_delta_net", ratio=3, size="tiny", on=""
    )
    model, size = switches["model"], switches["size"]
    c = recipes.language_model(size)
    c.name = f"{model}-{size}"
    c.model.width, c.model.depth, head_dim, *delta_heads = names.lookup(SIZES, size, "size")
    c.model.layers = names.lookup(MODELS, model, "model")
    if model == "study":
        mixer = names.lookup({name: name for name in STUDIED}, switches["mixer"], "mixer")
        c.name = f"study-{mixer}-{switches['ratio']}-{size}"
        if mixer == "gated_delta_net":
            c.model.depth = c.model.depth * 7 // 8
        c.model.layers = _study(mixer, switches["ratio"], c.model.depth)
    elif model == "deltanet_global":
        c.model.layers = _two_global(c.model.depth)
    _sizes(c.model, head_dim, *delta_heads)
    machines.place(c, switches["on"])
    return c


def _study(mixer: str, ratio: int, depth: int) -> str:
    """Full attention ends each of equal parts, at least one; what is over stands first."""
    if ratio < 0:
        raise ValueError(
            f"config argument ratio={ratio} must not be negative; 0 leaves attention out."
        )
    layer = f"{mixer}/narrow" if mixer == "retnet" else f"{mixer}/glu"
    if ratio == 0:
        return layer
    count = min(max(1, round(depth / (ratio + 1))), depth // 2)
    if count == 1:
        return f"repeat: {layer}; last: attention/glu"
    size, extra = divmod(depth, count)
    first = f"first: {extra}*{layer}; " if extra else ""
    return f"{first}repeat: {size - 1}*{layer} + attention/glu"


def _two_global(depth: int) -> str:
    """Full attention at layer 1 (the second) and in the middle."""
    between = depth // 2 - 2
    return (
        f"first: delta_net/glu + attention/glu + {between}*delta_net/glu + attention/glu; "
        "repeat: delta_net/glu"
    )


def _sizes(m, head_dim: int, delta_heads: int, delta_head_dim: int) -> None:
    """Heads as wide as the width asks for; windows of half a training row."""
    blocks, count = m.blocks, m.width // head_dim
    # RetNet's feed-forward has half the width, because its mixer has twice the parameters.
    blocks.narrow = config.block("glu", hidden=-(-(m.width * 4 // 3) // 256) * 256)
    heads = m.width // min(64, head_dim)
    blocks.attention.num_heads = heads
    window = 2048 if m.width >= 1024 else 128
    blocks.local = config.block("attention", num_heads=heads, window=window)
    blocks.gated_attention = config.block(
        "attention", num_heads=heads, num_kv_heads=max(1, heads // 8), qk_norm=True
    )
    blocks.gated_attention.update(use_gate=True, rope_fraction=0.25)
    blocks.gated_delta_net.update(num_heads=delta_heads, head_dim=delta_head_dim)
    blocks.delta_net.head_dim = blocks.hgrn2.head_dim = blocks.kda.head_dim = head_dim
    blocks.hgrn.bound_by_depth = blocks.hgrn2.bound_by_depth = True
    blocks.mamba2.update(head_dim=head_dim // 2, state_dim=head_dim)
    rope_dim = head_dim // 2
    blocks.latent_attention.update(num_heads=count, latent_dim=4 * head_dim, rope=False)
    blocks.latent_attention.update(nope_dim=head_dim, rope_dim=rope_dim, v_dim=head_dim)
