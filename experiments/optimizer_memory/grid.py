"""One run: a small transformer on text with one optimizer.

python -m effarch.train --config=experiments/optimizer_memory/grid.py:optimizer=coat
"""

from effarch import config, names

RANK = 32
OPTIMIZERS = {
    "adamw": (3e-3, {}),
    "adam8bit": (3e-3, {"group_size": 128}),
    "coat": (3e-3, {"group_size": 128}),
    "dct_adamw": (3e-3, {"rank": RANK}),
    "galore": (1.2e-2, {"rank": RANK, "update_gap": 50}),
    "muon": (1e-2, {}),
    "trion": (1e-2, {"rank": RANK}),
}
"""Optimizer -> (peak learning rate, options). GaLore scales its updates by 1/4."""


def get_config(arg=""):
    kind = config.parse_arg(arg, optimizer="adamw")["optimizer"]
    rate, options = names.lookup(OPTIMIZERS, kind, "optimizer")
    c = config.default()
    c.name = kind
    c.model.width, c.model.depth, c.model.layers = 128, 2, "attention/glu"
    c.model.blocks.attention.num_heads = 2
    c.model.blocks.glu.hidden = 256
    c.data.tokenizer, c.data.val_permille = "bytes", 20
    c.data.seq_len, c.data.batch_size, c.train.num_steps = 128, 8, 500
    c.optimizer.kind, c.optimizer.learning_rate = kind, rate
    c.optimizer[kind].update(options)
    c.optimizer.schedule.warmup_steps = 50
    c.optimizer.schedule.final_fraction = 0.0
    c.eval.every_steps, c.eval.max_batches = 100, 8
    c.checkpoint.every_steps = 0
    c.log.tensorboard = False
    c.log.sample_prompts = ()
    return c
