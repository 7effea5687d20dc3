"""The model whose experts are converted: 16 experts of width 64 in each of 3 layers, 4 a token.

python -m effarch.train --config=experiments/moe_conversion/grid.py
"""

from effarch import config, experiment_runs

EXPERT = 64


def get_config(arg=""):
    config.parse_arg(arg)
    c = experiment_runs.text_config(
        "moe-conversion", learning_rate=2e-3, warmup_steps=50, num_steps=1000, batch=(8, 256)
    )
    c.model.width, c.model.depth, c.model.layers = 128, 3, "attention/moe"
    c.model.blocks.attention.update(num_heads=2, head_dim=64)
    c.model.blocks.moe.update(num_experts=16, top_k=4, hidden=EXPERT)
    return c
