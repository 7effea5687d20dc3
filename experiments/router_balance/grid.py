"""One cell: three layers of 32 experts, balanced in one of six ways, 4 experts a token or 1.

python -m effarch.train --config=experiments/router_balance/grid.py:top_k=1,balance=schedule

loss: the balance loss, coefficient 0.01. bias: loss-free, sigmoid scores. At 1 expert a token also
schedule: the loss, and 8, then 4 experts a token in the first layer for 60 % of the run (progressive
sparsification), and top1: the Top-1 loss of Sigma-MoE-Tiny, arXiv 2512.16248.
"""

from effarch import config, experiment_runs, names

BALANCES = {4: ("loss", "bias"), 1: ("loss", "bias", "schedule", "top1")}
EXPERTS = 32


def get_config(arg=""):
    switches = config.parse_arg(arg, top_k=4, balance="loss", steps=300)
    top_k, steps = switches["top_k"], switches["steps"]
    known = names.lookup({str(key): value for key, value in BALANCES.items()}, str(top_k), "top_k")
    balance = names.lookup(dict(zip(known, known)), switches["balance"], "balance")
    c = experiment_runs.text_config(
        f"{balance}-{top_k}", learning_rate=2e-3, warmup_steps=30, num_steps=steps, batch=(8, 256)
    )
    c.model.width, c.model.depth, c.model.layers = 96, 3, "attention/moe"
    c.model.blocks.attention.update(num_heads=2, head_dim=48)
    moe = c.model.blocks.moe
    moe.update(num_experts=EXPERTS, top_k=top_k, hidden=48 if top_k > 1 else 96)
    moe.router = "softmax_topk_renorm" if top_k > 1 else "softmax_topk"
    if balance == "bias":
        moe.update(router="sigmoid_bias", balance_coef=0.0, bias_rate=0.003)
    if balance == "top1":
        moe.update(balance_coef=0.0, top1_coef=0.01)
    if balance == "schedule":
        c.model.layers = "first: attention/moe_first; repeat: attention/moe"
        c.model.blocks.moe_first = moe.copy_and_resolve_references()
        c.model.blocks.moe_first.top_k_schedule = ((steps * 3 // 10, 8), (steps * 6 // 10, 4))
    return c
