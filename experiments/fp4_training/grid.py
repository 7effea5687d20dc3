"""One run: a small transformer on text by one recipe.

python -m effarch.train --config=experiments/fp4_training/grid.py:recipe=quartet
"""

from effarch import config, names

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
    c = config.default()
    c.name = recipe
    c.model.width, c.model.depth, c.model.layers = 64, 2, "attention/glu"
    c.model.blocks.attention.num_heads = 2
    c.model.blocks.glu.hidden = 128
    c.quantization.recipe = recipe
    if recipe != "none":
        c.quantization[recipe].update(names.lookup(RECIPES, recipe, "recipe"))
        c.quantization.metrics_every = 200
    c.data.tokenizer, c.data.val_permille = "bytes", 20
    c.data.seq_len, c.data.batch_size, c.train.num_steps = 256, 8, 800
    c.optimizer.learning_rate = 4e-3
    c.optimizer.schedule.warmup_steps = 80
    c.optimizer.schedule.final_fraction = 0.0
    c.eval.every_steps, c.eval.max_batches = 100, 8
    c.checkpoint.every_steps = 0
    c.log.tensorboard = False
    c.log.sample_prompts = ()
    return c
