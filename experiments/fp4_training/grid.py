"""One run: a small transformer on text by one recipe.

python -m effarch.train --config=experiments/fp4_training/grid.py:recipe=quartet
"""

from effarch import config, experiment_runs, names

RECIPES = {
    "none": {},
    "fp8_current": {},
    "mxfp8": {},
    "nvfp4": {},
    "quartet": {},
    "quest": {"bits": 4, "rotate": 64},
    "mxfp4": {},
}
"""Recipe -> its options where they are not the defaults. `mxfp4` is plain rounding to nearest."""


def get_config(arg=""):
    recipe = config.parse_arg(arg, recipe="none")["recipe"]
    c = experiment_runs.text_config(
        recipe, learning_rate=4e-3, warmup_steps=80, num_steps=800, batch=(8, 256)
    )
    c.model.width, c.model.depth, c.model.layers = 64, 2, "attention/glu"
    c.model.blocks.attention.num_heads = 2
    c.model.blocks.glu.hidden = 128
    c.quantization.recipe = recipe
    if recipe != "none":
        c.quantization[recipe].update(names.lookup(RECIPES, recipe, "recipe"))
        c.quantization.metrics_every = 200
    c.eval.every_steps, c.eval.max_batches = 100, 8
    return c
