"""A gated-DeltaNet hybrid that learns the Python standard library on a laptop in minutes.

    python -m effarch.train --config=configs/quickstart.py
    python -m effarch.train --config=configs/quickstart.py:mixer=attention

The second trains its twin of equal size with attention alone. The README says what they reach.
"""

from effarch import config, names

#           layers, width of the feed-forward (such that both have 2.1 M parameters)
MIXERS = {
    "hybrid": ("3*gated_delta_net/glu + attention/glu", 432),
    "attention": ("attention/glu", 516),
}


def get_config(arg=""):
    mixer = config.parse_arg(arg, mixer="hybrid")["mixer"]
    layers, hidden = names.lookup(MIXERS, mixer, "mixer")
    c = config.default()
    c.name = f"quickstart-{mixer}"
    c.data.seq_len, c.data.batch_size = 256, 8
    c.model.width, c.model.depth, c.model.layers = 160, 4, layers
    c.model.blocks.attention.update(num_heads=4, head_dim=40, qk_norm=True)
    c.model.blocks.gated_delta_net.update(num_heads=3, head_dim=40, expand_v=2.0)
    c.model.blocks.glu.hidden = hidden
    c.optimizer.kind = "muon"
    c.optimizer.learning_rate = 4e-3
    c.optimizer.schedule.final_fraction = 0.0
    c.optimizer.schedule.warmup_steps = 40
    c.train.num_steps = 660
    c.eval.every_steps = c.checkpoint.every_steps = 220
    c.eval.max_batches = 20
    return c
