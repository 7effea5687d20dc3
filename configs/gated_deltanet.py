"""Gated DeltaNet (arXiv 2412.06464) at four sizes, pure or with softmax attention in between.

    python -m effarch.train --config=configs/gated_deltanet.py:size=tiny
    python -m effarch.train --config=configs/gated_deltanet.py:size=340m,layers=hybrid,on=h100x8

Key heads take 3/4 of the width and values twice that, so that a mixer has 6 width^2 parameters. The
340m size keeps this rule; the published file of that name keeps the heads of the 1.3b size instead.
"""

from effarch import config, names
from effarch.configs import machines, recipes

#        width depth heads head_dim (of keys; values are twice as wide)
SIZES = {
    "tiny": (128, 4, 2, 48),
    "50m": (512, 8, 3, 128),
    "340m": (1024, 21, 6, 128),
    "1.3b": (2048, 21, 6, 256),
}
LAYERS = {
    "pure": "gated_delta_net/glu",
    "hybrid": "3*gated_delta_net/glu + attention/glu",
}


def get_config(arg=""):
    switches = config.parse_arg(arg, size="tiny", layers="pure", on="")
    size = switches["size"]
    width, depth, num_heads, head_dim = names.lookup(SIZES, size, "size")
    c = recipes.language_model(size)
    c.name = f"gated-deltanet-{switches['layers']}-{size}"
    c.model.width, c.model.depth = width, depth
    c.model.layers = names.lookup(LAYERS, switches["layers"], "layers")
    c.model.blocks.gated_delta_net.update(num_heads=num_heads, head_dim=head_dim)
    c.model.blocks.attention.num_heads = width // 64
    machines.place(c, switches["on"])
    return c
