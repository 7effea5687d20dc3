"""The model whose experts are converted: 16 experts of width 64 in each of 3 layers, 4 a token.

python -m effarch.train --config=experiments/moe_conversion/grid.py
"""

from effarch import config

EXPERT = 64


def get_config(arg=""):
    config.parse_arg(arg)
    c = config.default()
    c.name = "moe-conversion"
    c.model.width, c.model.depth, c.model.layers = 128, 3, "attention/moe"
    c.model.blocks.attention.update(num_heads=2, head_dim=64)
    c.model.blocks.moe.update(num_experts=16, top_k=4, hidden=EXPERT)
    c.optimizer.learning_rate = 2e-3
    c.optimizer.schedule.warmup_steps = 50
    c.optimizer.schedule.final_fraction = 0.0
    c.eval.every_steps = c.checkpoint.every_steps = 0
    c.log.tensorboard = False
    c.log.sample_prompts = ()
    c.data.tokenizer, c.data.val_permille = "bytes", 20
    c.data.seq_len, c.data.batch_size, c.train.num_steps = 256, 8, 1000
    return c
