"""One run: a small transformer on text with one optimizer.

python -m effarch.train --config=experiments/optimizer_memory/grid.py:optimizer=coat
"""

from effarch import config, experiment_runs, names

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
    c = experiment_runs.text_config(
        kind, learning_rate=rate, warmup_steps=50, num_steps=500, batch=(8, 128)
    )
    c.model.width, c.model.depth, c.model.layers = 128, 2, "attention/glu"
    c.model.blocks.attention.num_heads = 2
    c.model.blocks.glu.hidden = 256
    c.optimizer.kind = kind
    c.optimizer[kind].update(options)
    c.eval.every_steps, c.eval.max_batches = 100, 8
    return c
