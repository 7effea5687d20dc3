"""Models that learn a synthetic task on a CPU in a minute or two: one word changes the mixer.

    python -m effarch.train --config=configs/tasks.py:task=mqar,mixer=gated_delta_net
    python -m effarch.train --config=configs/tasks.py:task=state_tracking,mixer=delta_net \\
        --config.data.task.state_tracking.group=Z2 --config.model.blocks.delta_net.allow_neg_eigval=true
    python -m effarch.evaluate --run=runs/FOLDER --seq_len=256
    python -m effarch.sweep --config=configs/tasks.py:tasks=all,mixers=kda+gla+attention

Layer 0 is attention over two tokens, in place of the short convolution of the published recall setups
(arXiv 2402.18668), so that no mixer lacks the neighbour; the others are the mixer, alone or with a
feed-forward. Recurrent mixers have two heads with states of head_dim x head_dim.
"""

from effarch import config, names, sweeps
from effarch.models import mixers

#    task: (layers after the first, depth, rows, tokens a row, steps, options that differ)
TASKS = {
    "compression": ("{}/glu", 3, 64, 64, 600, {}),
    "copying": ("{}/glu", 3, 32, 96, 600, {}),
    "fuzzy_recall": ("{}/glu", 3, 32, 128, 600, {}),
    "in_context_recall": ("{}/glu", 3, 32, 128, 300, {}),
    "linear_regression": ("{}/glu", 4, 64, 50, 800, {}),
    "memorization": ("{}/glu", 3, 128, 32, 600, {}),
    "mqar": ("{}/none", 2, 64, 64, 1000, dict(vocab_size=256, num_pairs=(4, 8, 16))),
    "needles": ("{}/glu", 3, 8, 512, 300, {}),
    "noisy_recall": ("{}/glu", 3, 32, 128, 300, {}),
    "selective_copying": ("{}/glu", 3, 32, 128, 600, dict(num_words=8)),
    "state_tracking": ("{}/glu", 3, 64, 32, 1000, {}),
}


SWITCHES = {
    "task": "mqar",
    "mixer": "gated_delta_net",
    "head_dim": 16,
    "tasks": "all",
    "mixers": "",
}
"""`tasks` and `mixers` are of the sweep: names joined by +."""


def get_config(arg=""):
    switches = config.parse_arg(arg, **SWITCHES)
    task, mixer, head_dim = (switches[name] for name in ("task", "mixer", "head_dim"))
    layers, depth, *sizes, options = names.lookup(TASKS, task, "task")
    names.lookup(mixers.KINDS, mixer, "mixer")
    c = config.default()
    c.name = f"{task}-{mixer}-{head_dim}"
    c.data.task.name = task
    c.data.task[task].update(options)
    c.data.batch_size, c.data.seq_len, c.train.num_steps = sizes
    c.model.width, c.model.depth = 64, depth
    c.model.layers = f"first: shift/none; repeat: {layers.format(mixer)}"
    c.model.blocks.shift = config.block("attention", num_heads=2, window=2)
    c.model.blocks.glu.hidden = 128
    _sizes(c.model, head_dim)
    c.optimizer.kind = "muon"
    c.optimizer.learning_rate = 1e-2
    c.optimizer.schedule.warmup_steps = 50
    c.optimizer.schedule.final_fraction = 0.0
    c.eval.every_steps = c.checkpoint.every_steps = c.train.num_steps // 4
    c.eval.max_batches = 4
    return c


def get_sweep(arg=""):
    """Every mixer on every task, one run each."""
    switches = config.parse_arg(arg, **SWITCHES)
    found = list(TASKS) if switches["tasks"] == "all" else switches["tasks"].split("+")
    kinds = (switches["mixers"] or switches["mixer"]).split("+")
    head_dim = switches["head_dim"]
    runs = [
        get_config(f"task={task},mixer={mixer},head_dim={head_dim}")
        for task in found
        for mixer in kinds
    ]
    return sweeps.configs(get_config(arg), runs)


def _sizes(m, head_dim: int) -> None:
    """Two heads with a state of head_dim x head_dim each; that of HGRN is as large as the width."""
    blocks, heads = m.blocks, 2
    expand = heads * head_dim / m.width
    blocks.attention.update(num_heads=heads, head_dim=head_dim)
    for kind in ("delta_net", "gated_delta_net", "kda", "hgrn2"):
        blocks[kind].update(num_heads=heads, head_dim=head_dim)
    blocks.gated_delta_net.expand_v = 1.0
    for kind in ("gla", "retnet", "linear_attention"):
        blocks[kind].update(num_heads=heads, expand_k=expand, expand_v=expand)
    blocks.mamba2.update(expand=expand, head_dim=head_dim, state_dim=head_dim)
    blocks.latent_attention.update(num_heads=heads, latent_dim=2 * head_dim, nope_dim=head_dim)
    blocks.latent_attention.update(rope_dim=head_dim // 2, v_dim=head_dim)
