"""What the shipped language-model configs share: data, optimizer and length by size."""

from effarch import config


def language_model(size: str):
    """`tiny` trains on a CPU; the others follow the published runs (AdamW, cosine, 4096 tokens)."""
    c = config.default()
    c.model.tied_head = False
    if size == "tiny":
        c.data.seq_len, c.data.batch_size = 256, 8
        c.optimizer.learning_rate = 2e-3
        c.optimizer.schedule.warmup_steps = 50
        c.train.num_steps = 500
        return c
    # Gated DeltaNet, arXiv 2412.06464: 0.5M tokens a step, peak 4e-4, 1B tokens of warmup, decay 0.1.
    c.data.tokenizer = "bpe:32000"
    c.data.seq_len, c.data.batch_size = 4096, 128
    c.optimizer.learning_rate = 4e-4
    c.optimizer.schedule.warmup_steps = 1900
    c.optimizer.adamw.weight_decay = 0.1
    c.train.num_steps = {"50m": 4_000, "340m": 28_600, "1.3b": 190_700}[size]
    c.eval.every_steps = c.checkpoint.every_steps = 1000
    c.model.remat = "full" if size == "1.3b" else "none"
    return c
