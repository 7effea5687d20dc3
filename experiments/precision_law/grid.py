"""One run: a small transformer on text, a width, a length and a number format.

python -m effarch.train --config=experiments/precision_law/grid.py:format=quest4,width=64,steps=400
"""

from effarch import config, experiment_runs, names

FORMATS = {
    "none": ("none", {}),
    "quest8": ("quest", {"bits": 8, "rotate": 16}),
    "quest4": ("quest", {"bits": 4, "rotate": 16}),
    "quest2": ("quest", {"bits": 2, "rotate": 16}),
    "quest1": ("quest", {"bits": 1, "rotate": 16}),
    "mxfp4 forward": ("quartet", {"backward": "none"}),
    "stochastic forward": ("quartet", {"backward": "none", "forward": "stochastic"}),
    "quartet": ("quartet", {}),
    "nearest backward": ("quartet", {"gradient": "nearest"}),
    "pma backward": ("quartet", {"gradient": "pma"}),
    "quest backward": ("quartet", {"gradient": "quest"}),
}
"""Format -> recipe and its options; `quartet` and `... backward` round the backward pass too."""
WIDTHS, STEPS = (32, 64, 96, 128), (200, 400, 800)
ENDS = ((32, 200), (32, 800), (96, 200), (96, 800))
"""(width, steps) of the formats; those of `none` are all pairs."""


def get_config(arg=""):
    found = config.parse_arg(arg, format="none", width=64, steps=400)
    recipe, options = names.lookup(FORMATS, found["format"].replace("_", " "), "format")
    c = experiment_runs.text_config(
        f"{found['format']}-{found['width']}-{found['steps']}",
        learning_rate=4e-3,
        warmup_steps=found["steps"] // 10,
        num_steps=found["steps"],
        batch=(4, 256),
    )
    c.model.width, c.model.depth, c.model.layers = found["width"], 2, "attention/glu"
    c.model.blocks.attention.num_heads = 2
    c.model.blocks.glu.hidden = 2 * found["width"]
    c.quantization.recipe = recipe
    if options:
        c.quantization[recipe].update(options)
    return c
