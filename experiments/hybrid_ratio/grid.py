"""One cell of the grid: a stack of four layers, of which some are full attention, on text or on recall.

python -m effarch.train --config=experiments/hybrid_ratio/grid.py:mixer=gla,attention=1,data=text
"""

from effarch import config, names

DEPTH = 4
STACKS = {
    0: "repeat: {}/glu",
    1: "repeat: 3*{}/glu + attention/glu",
    2: "repeat: {}/glu + attention/glu",
    3: "repeat: {}/glu + 3*attention/glu",
    4: "repeat: attention/glu",
}
"""Layers of full attention -> the stack."""
MIXERS = ("delta_net", "gated_delta_net", "gla", "hgrn2", "hgrn", "retnet")
HEADS, HEAD_DIM = 2, 32


def get_config(arg=""):
    switches = config.parse_arg(arg, mixer="gated_delta_net", attention=2, data="text")
    mixer = names.lookup(dict(zip(MIXERS, MIXERS)), switches["mixer"], "mixer")
    c = config.default()
    c.name = f"{switches['data']}-{mixer}-{switches['attention']}"
    c.model.width, c.model.depth = HEADS * HEAD_DIM, DEPTH
    c.model.layers = STACKS[switches["attention"]].format(mixer)
    _sizes(c.model.blocks)
    c.optimizer.kind = "muon"
    c.optimizer.learning_rate = 1e-2
    c.optimizer.schedule.warmup_steps = 30
    c.optimizer.schedule.final_fraction = 0.0
    c.eval.every_steps = c.checkpoint.every_steps = 0
    c.log.tensorboard = False
    c.log.sample_prompts = ()
    if names.lookup({"text": True, "recall": False}, switches["data"], "data"):
        c.data.tokenizer, c.data.val_permille = "bytes", 20
        c.data.seq_len, c.data.batch_size, c.train.num_steps = 256, 8, 400
    else:
        c.data.task.name = "mqar"
        c.data.task.mqar.update(vocab_size=128, num_pairs=(4, 8, 16))
        c.data.seq_len, c.data.batch_size, c.train.num_steps = 64, 32, 600
    return c


def _sizes(blocks) -> None:
    """Two heads of 32 x 32 in every mixer; around it what its authors put there."""
    blocks.glu.hidden = 128
    blocks.attention.update(num_heads=HEADS, head_dim=HEAD_DIM)
    for kind in ("delta_net", "gated_delta_net", "hgrn2"):
        blocks[kind].update(num_heads=HEADS, head_dim=HEAD_DIM)
    blocks.gated_delta_net.expand_v = 1.0
    blocks.hgrn.bound_by_depth = blocks.hgrn2.bound_by_depth = True
    for kind in ("gla", "retnet"):
        blocks[kind].update(num_heads=HEADS, expand_k=1.0, expand_v=1.0)
