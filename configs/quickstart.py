"""A gated-DeltaNet hybrid that learns the Python standard library on a laptop in minutes.

python -m effarch.train --config=configs/quickstart.py
python -m effarch.train --config=configs/quickstart.py:mixer=attention   (its attention-only twin)
"""

from effarch import config, names

LAYERS = {
    "hybrid": "3*gated_delta_net/glu + attention/glu",
    "attention": "attention/glu",
}


def get_config(arg=""):
    switches = config.parse_arg(arg, mixer="hybrid")
    c = config.default()
    c.name = f"quickstart-{switches['mixer']}"
    c.data.seq_len = 256
    c.data.batch_size = 16
    c.model.width = 192
    c.model.depth = 4
    c.model.layers = names.lookup(LAYERS, switches["mixer"], "mixer")
    c.model.blocks.attention.update(num_heads=3, head_dim=64, qk_norm=True)
    c.model.blocks.gated_delta_net.update(num_heads=3, head_dim=48, expand_v=2.0)
    c.model.blocks.glu.hidden = 512
    c.optimizer.kind = "muon"
    c.optimizer.learning_rate = 5e-3
    c.optimizer.schedule.warmup_steps = 20
    c.train.num_steps = 300
    c.eval.every_steps = 100
    c.eval.max_batches = 20
    c.checkpoint.every_steps = 100
    return c
