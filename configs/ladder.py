"""A ladder of IsoFLOP budgets: at each, models around the predicted optimum with tuned lr and batch.

    python -m effarch.sweep --config=ladder:budgets=1e13+3e13+1e14 --dry_run
    python -m effarch.sweep --config=ladder:budgets=1e13,layers=hybrid --parallel=2
    python -m effarch.isoflop runs/sweep-ladder-hybrid/results.csv --figure=isoflop.png

The optimum N* = 0.1189 C^0.4969, lr = 0.0047 (N / 108M)^(-1/3) and batch = 160 x 2048 (N / 108M)^(2/3)
tokens are those of Porian et al., arXiv 2406.19146. N counts the matrices with the head, C = 6 N D; the
dry run also shows the model's own FLOPs, which are more in small models. lr is clipped at 2^-7, since
the law was fitted on larger models. Bytes, so that the head stays small.
"""

import math

from effarch import config, names, sweeps

LAYERS = {
    "attention": "attention/glu",
    "hybrid": "3*gated_delta_net/glu + attention/glu",
}
FACTORS = (1 / 4, 1 / 2.5, 1 / 1.6, 1, 1.6, 2.5, 4)
"""Sizes at each budget, in units of the predicted optimum; those that round to one shape run once."""
HEAD_DIM, SEQ_LEN, VOCAB_SIZE = 32, 256, 320
LARGEST_LR = 2**-7


def get_config(arg=""):
    switches = config.parse_arg(arg, budgets="1e13", layers="attention", seeds=1)
    c = config.default()
    c.name = f"ladder-{switches['layers']}"
    c.data.tokenizer, c.data.seq_len = "bytes", SEQ_LEN
    c.model.layers = names.lookup(LAYERS, switches["layers"], "layers")
    c.model.blocks.attention.update(head_dim=HEAD_DIM, qk_norm=True)
    c.model.blocks.gated_delta_net.update(head_dim=HEAD_DIM, expand_v=2.0)
    c.model.z_loss = 1e-4
    c.eval.every_steps = c.checkpoint.every_steps = 0
    c.log.sample_prompts, c.log.tensorboard = (), False
    return c


def get_sweep(arg=""):
    switches = config.parse_arg(arg, budgets="1e13", layers="attention", seeds=1)
    names.lookup(LAYERS, switches["layers"], "layers")
    rungs = [
        rung(budget, factor, switches["layers"])
        for budget in _budgets(switches["budgets"])
        for factor in FACTORS
    ]
    return sweeps.product(rungs, {"seed": range(switches["seeds"])})


def _budgets(text: str) -> list[float]:
    """`1e13+3e13` as numbers."""
    try:
        budgets = [float(budget) for budget in text.split("+")]
    except ValueError:
        budgets = []
    if not budgets or not all(0 < budget < math.inf for budget in budgets):
        raise ValueError(f"ladder:budgets={text} must be FLOPs above 0, such as 1e13+3e13.")
    return budgets


def rung(flops: float, factor: float, layers: str) -> dict:
    """The overrides of the model of about `factor` times the optimal size at a budget."""
    width, depth = shape(factor * 0.1189 * flops**0.4969, layers)
    size = params(width, depth, layers)
    scale = size / 108e6
    rows = max(round(160 * 2048 * scale ** (2 / 3) / SEQ_LEN), 1)
    steps = max(round(flops / (6 * size * rows * SEQ_LEN)), 1)
    return {
        "model.width": width,
        "model.depth": depth,
        "model.blocks.attention.num_heads": width // HEAD_DIM,
        "model.blocks.gated_delta_net.num_heads": delta_heads(width),
        "model.blocks.glu.hidden": hidden(width),
        "optimizer.learning_rate": min(0.0047 * scale ** (-1 / 3), LARGEST_LR),
        "optimizer.schedule.warmup_steps": max(min(steps // 10, size // (rows * SEQ_LEN)), 1),
        "data.batch_size": rows,
        "train.num_steps": steps,
    }


def shape(size: float, layers: str) -> tuple[int, int]:
    """(width, depth) whose parameters come nearest in ratio.

    Width is a multiple of the head's and 16 to 64 times the depth, depth a multiple of 4, the
    hybrid's period.
    """
    widths, depths = range(HEAD_DIM, 4097, HEAD_DIM), (4, 8, 12, 16, 20, 24, 32)
    fitting = [
        (w, d) for w in widths for d in depths if 16 <= w / d <= 64 or (w, d) == (HEAD_DIM, 4)
    ]
    return min(fitting, key=lambda s: (abs(math.log(params(*s, layers) / size)), s))


def params(width: int, depth: int, layers: str) -> int:
    """Weights of the matrices: attention 4 W^2, delta rule about 6 W^2, GLU 3 W F, and the head."""
    attention = 4 * width**2
    delta = width * delta_heads(width) * (8 * HEAD_DIM + 2)
    mixers = depth * attention if layers == "attention" else depth // 4 * (3 * delta + attention)
    return mixers + depth * 3 * width * hidden(width) + VOCAB_SIZE * width


def delta_heads(width: int) -> int:
    """Three quarters of the attention's heads, with values twice as wide as keys."""
    return max(round(3 * width / HEAD_DIM / 4), 1)


def hidden(width: int) -> int:
    """8/3 of the width, a multiple of 16."""
    return round(8 * width / 3 / 16) * 16
