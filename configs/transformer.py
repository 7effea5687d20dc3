"""The baseline transformer (Llama shape) at four sizes; 340m and 1.3b as in the hybrid studies.

    python -m effarch.train --config=configs/transformer.py:size=tiny
    python -m effarch.train --config=configs/transformer.py:size=1.3b,on=v6e-64

Sizes: DeltaNet, arXiv 2406.06484, and flame's configs (width 1024 / 2048, 24 layers, heads of 64).
"""

from effarch import config, names
from effarch.configs import machines, recipes

#        width depth heads
SIZES = {
    "tiny": (128, 4, 2),
    "50m": (512, 8, 8),
    "340m": (1024, 24, 16),
    "1.3b": (2048, 24, 32),
}


def get_config(arg=""):
    switches = config.parse_arg(arg, size="tiny", on="")
    size = switches["size"]
    width, depth, num_heads = names.lookup(SIZES, size, "size")
    c = recipes.language_model(size)
    c.name = f"transformer-{size}"
    c.model.width, c.model.depth = width, depth
    c.model.layers = "attention/glu"
    c.model.blocks.attention.num_heads = num_heads
    machines.place(c, switches["on"])
    return c
