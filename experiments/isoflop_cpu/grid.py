"""One run: an architecture and a width that spend a budget of training FLOPs.

    python -m effarch.train --config=experiments/isoflop_cpu/grid.py:layers=hybrid,width=80,flops=1e13

FLOPs are the model's own as effarch counts them (effarch/models/accounting.py), forward and backward:
all matrices with the output head, causal attention, recurrences; the input table does no work. The rate
is constant but for the last fifth of the steps, so that runs of one width share their beginning.
"""

import math

from effarch import config, experiment_runs, names
from effarch.models import accounting, build

LAYERS = {
    "transformer": ("attention/glu", 8 / 3),
    "hybrid": ("3*gated_delta_net/glu + attention/glu", 13 / 6),
}
"""Architecture -> layers, and hidden width of the feed-forward in model widths W: a delta rule has 6 W^2
weights and attention 4 W^2, so that models of one width have one size."""
BUDGETS = {
    3e12: (32, 48, 64, 80, 112),
    1e13: (32, 48, 64, 80, 112),
    3e13: (48, 64, 80, 112, 144),
    1e14: (64, 80, 112, 144, 192),
}
"""FLOPs -> widths. Those of 3e12 lie around N* = 0.1189 C^0.4969 (Porian et al., arXiv 2406.19146); the
lowest losses were at 0.6 of it, and so the others are around that."""
WIDTHS = (16, 32, 48, 64, 80, 112, 144, 192, 256, 320)
"""Those that a budget may be given where its lowest loss is not in the middle."""
DEPTH, SEQ_LEN, ROWS, VOCAB_SIZE = 4, 256, 16, 320


def get_config(arg=""):
    found = config.parse_arg(arg, layers="hybrid", width=80, flops=1e13)
    width = found["width"]
    layers, hidden = names.lookup(LAYERS, found["layers"], "layers")
    c = experiment_runs.text_config(
        f"{found['layers']}-{width}",
        learning_rate=rate(width),
        warmup_steps=40,
        num_steps=1,
        batch=(ROWS, SEQ_LEN),
    )
    c.data.val_permille = 50
    c.model.layers, c.model.width, c.model.depth = layers, width, DEPTH
    c.model.vocab_size = VOCAB_SIZE
    heads = 2 if width < 128 else 4
    blocks = c.model.blocks
    blocks.attention.update(num_heads=heads, head_dim=width // heads, qk_norm=True)
    blocks.gated_delta_net.update(num_heads=heads, head_dim=3 * width // heads // 4, expand_v=2.0)
    blocks.glu.hidden = round(hidden * width / 8) * 8
    c.optimizer.kind = "muon"
    _spend(c, found["flops"])
    return c


def rate(width: int) -> float:
    """The peak, of both architectures: updates of Muon have one rms, so their norm grows as sqrt(W)."""
    return 1e-2 * math.sqrt(80 / width)


def _spend(c, flops: float) -> None:
    """Sets the steps that cost so much, a multiple of 5: the decay is the last fifth of them."""
    counts = accounting.count(build.abstract(c.model, vocab_size=VOCAB_SIZE), SEQ_LEN)
    fifths = max(round(flops / (5 * counts.flops_per_token * ROWS * SEQ_LEN)), 1)
    c.train.num_steps = 5 * fifths
    c.optimizer.schedule.kind, c.optimizer.schedule.decay_fraction = "wsd", 0.2
    c.checkpoint.every_steps, c.checkpoint.keep_period = fifths, 4 * fifths
