"""One cell: three layers of plain experts, of MoLE or of LatentMoE, made equal in FLOPs or parameters.

python -m effarch.train --config=experiments/latent_experts/grid.py:kind=mole8,equal=flops

The width of an expert (of MoLE its rank as well, as in the paper) is the one that comes nearest to the
plain layer's forward FLOPs a token, or to its parameters. Every matrix of a feed-forward starts with
variance 1 / rows: of one fixed deviation, the product of a latent's matrices would start too small.
"""

from effarch import config, experiment_runs, names

WIDTH, EXPERTS, TOP_K, HIDDEN = 96, 32, 4, 48
KINDS = ("standard", "mole4", "mole8", "mole32", "latent_moe")
EQUAL = ("flops", "params")


def get_config(arg=""):
    switches = config.parse_arg(arg, kind="standard", equal="flops")
    kind = names.lookup(dict(zip(KINDS, KINDS)), switches["kind"], "kind")
    equal = names.lookup(dict(zip(EQUAL, EQUAL)), switches["equal"], "equal")
    c = experiment_runs.text_config(
        f"{kind}-{equal}", learning_rate=2e-3, warmup_steps=30, num_steps=300, batch=(8, 256)
    )
    c.model.width, c.model.depth = WIDTH, 3
    c.model.blocks.attention.update(num_heads=2, head_dim=48)
    hidden = min(range(4, 4 * HIDDEN), key=lambda f: abs(cost(kind, equal, f) - target(equal)))
    c.model.init_rules = tuple(
        f"layers/*/ffn/{path} {rows**-0.5 / c.model.init_std:.4f}"
        for path, rows in _rows(kind, hidden).items()
    )
    if kind == "standard":
        c.model.layers = "attention/moe"
        c.model.blocks.moe.update(num_experts=EXPERTS, top_k=TOP_K, hidden=hidden)
    elif kind == "latent_moe":
        c.model.layers = "attention/latent_moe"
        c.model.blocks.latent_moe.update(num_experts=4 * EXPERTS, top_k=4 * TOP_K, hidden=hidden)
    else:
        c.model.layers = "attention/mole"
        size = int(kind.removeprefix("mole"))
        c.model.blocks.mole.update(num_experts=EXPERTS, top_k=TOP_K, hidden=hidden, group_size=size)
    return c


def _rows(kind: str, hidden: int) -> dict[str, int]:
    """Rows of each matrix of a feed-forward but its router's."""
    latent = {"standard": WIDTH, "latent_moe": WIDTH // 4}.get(kind, hidden)
    rows = {"experts/gate": latent, "experts/up": latent, "experts/down": hidden}
    if kind == "latent_moe":
        return rows | {"project_in/kernel": WIDTH, "project_out/kernel": latent}
    if kind == "standard":
        return rows
    return rows | {"experts/latent_gate": WIDTH, "experts/latent_up": WIDTH}


def target(equal: str) -> int:
    """Of the plain layer."""
    return cost("standard", equal, HIDDEN)


def cost(kind: str, equal: str, hidden: int) -> int:
    """Forward FLOPs a token, or parameters, of one layer's experts and router.

    MoLE's tokens touch as many groups as they have choices, where there are as many.
    """
    d, f, experts, top_k, each = WIDTH, hidden, EXPERTS, TOP_K, 2 if equal == "flops" else 1
    if kind == "latent_moe":
        experts, top_k = 4 * experts, 4 * top_k
    used = top_k if equal == "flops" else experts
    if kind == "standard":
        return each * (3 * d * f * used + d * experts)
    if kind == "latent_moe":
        return each * (3 * (d // 4) * f * used + 2 * d * (d // 4) + d * experts)
    groups = experts // int(kind.removeprefix("mole"))
    groups = min(groups, used) if equal == "flops" else groups
    return each * (used * (2 * f * f + f * d) + 2 * groups * f * d + d * experts)
