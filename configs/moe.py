"""Mixture-of-experts models: published shapes, and tiny ones of each kind that train on a CPU.

    python -m effarch.train --config=configs/moe.py:size=mole_tiny

Sizes: mixtral (8x7B), qwen3_moe (30B-A3B), olmoe (1B-7B), deepseek_v3, ling_mini (2.0), and with `_tiny`
their routers at width 128; mole_tiny, latent_moe_tiny, sigma_tiny, blockffn_tiny. Router settings as
moe.md's sources give them; lengths and batches are ours.
"""

from effarch import config, names


def get_config(arg=""):
    size = config.parse_arg(arg, size="mixtral_tiny")["size"]
    model = names.lookup(MODELS, size.removesuffix("_tiny"), "size")
    is_tiny = size.endswith("_tiny")
    if not is_tiny and model in (_mole, _latent_moe, _sigma, _blockffn):
        raise ValueError(f"size={size!r} is shipped at tiny size only; use size={size}_tiny.")
    c = config.default()
    c.name = size.replace("_", "-")
    c.model.tied_head = False
    c.model.layers = "attention/moe"
    model(c.model, c.model.blocks)
    (_tiny if is_tiny else _large)(c)
    return c


def _mixtral(m, blocks):
    """arXiv 2401.04088."""
    m.width, m.depth, m.vocab_size, m.norm.eps = 4096, 32, 32000, 1e-5
    blocks.attention.update(num_heads=32, num_kv_heads=8, head_dim=128, rope_theta=1e6)
    blocks.moe.update(num_experts=8, top_k=2, hidden=14336)
    blocks.moe.update(balance_coef=0.001, balance_scaling="hf")


def _qwen3(m, blocks):
    """arXiv 2505.09388."""
    m.width, m.depth, m.vocab_size = 2048, 48, 151936
    blocks.attention.update(num_heads=32, num_kv_heads=4, head_dim=128, rope_theta=1e6)
    blocks.attention.qk_norm = True
    blocks.moe.update(num_experts=128, top_k=8, hidden=768)
    blocks.moe.update(balance_coef=0.001, balance_scaling="hf")


def _olmoe(m, blocks):
    """arXiv 2409.02060."""
    m.width, m.depth, m.vocab_size, m.norm.eps = 2048, 16, 50304, 1e-5
    blocks.attention.update(num_heads=16, head_dim=128, qk_norm=True, qk_norm_whole=True)
    blocks.moe.update(num_experts=64, top_k=8, hidden=1024, router="softmax_topk")
    blocks.moe.update(balance_coef=0.01, z_coef=0.001)


def _deepseek_v3(m, blocks):
    """arXiv 2412.19437, without multi-token prediction."""
    m.width, m.depth, m.vocab_size = 7168, 61, 129280
    m.layers = "first: 3*latent_attention/glu; repeat: latent_attention/moe"
    blocks.latent_attention.update(num_heads=128, q_latent_dim=1536)
    blocks.glu.hidden = 18432
    blocks.moe.update(num_experts=256, top_k=8, hidden=2048, num_shared=1)
    _bias_router(blocks.moe)
    blocks.moe.update(balance_coef=1e-4, balance_scope="sequence")


def _ling_mini(m, blocks):
    """Ling-mini-2.0, arXiv 2510.22115, without multi-token prediction."""
    m.width, m.depth, m.vocab_size = 2048, 20, 157184
    m.layers = "first: attention/glu; repeat: attention/moe"
    blocks.attention.update(num_heads=16, num_kv_heads=4, head_dim=128, qk_norm=True)
    blocks.attention.update(rope_theta=600000.0, rope_fraction=0.5)
    blocks.glu.hidden = 5120
    blocks.moe.update(num_experts=256, top_k=8, hidden=512, num_shared=1)
    _bias_router(blocks.moe)
    blocks.moe.update(bias_zero_mean=True, balance_coef=0.0, z_coef=3.5e-6)


def _bias_router(moe):
    """DeepSeek-V3's: sigmoid scores, loss-free balance, 4 of 8 groups, weights that sum to 2.5."""
    moe.update(router="sigmoid_bias", bias_rate=1e-3, num_groups=8, top_groups=4)
    moe.routed_scaling = 2.5


def _mole(m, blocks):
    """MoLE version 1, arXiv 2503.23100: experts of groups of 8 share their way into a latent."""
    m.layers = "first: attention/glu; repeat: attention/mole"
    blocks.mole.update(num_experts=16, top_k=4, hidden=64, group_size=8, num_shared=1)


def _latent_moe(m, blocks):
    """LatentMoE, arXiv 2601.18089: 4 times the experts and choices in a quarter of the width."""
    m.layers = "first: attention/glu; repeat: attention/latent_moe"
    blocks.latent_moe.update(num_experts=64, top_k=8, hidden=64, num_shared=1, latent=32)
    blocks.latent_moe.update(is_gated=False, activation="relu2", balance_coef=1e-4)
    blocks.latent_moe.update(router="sigmoid_bias", bias_rate=1e-3, balance_scope="sequence")


def _sigma(m, blocks):
    """Sigma-MoE-Tiny, arXiv 2512.16248: one expert a token, more in the lower layers for most of the
    run, and the Top-1 balance loss."""
    m.layers = "first: 2*attention/moe_lower; repeat: attention/moe"
    blocks.moe.update(num_experts=16, top_k=1, hidden=64, router="softmax_topk")
    blocks.moe.update(balance_coef=0.0, top1_coef=0.01)
    blocks.moe_lower = blocks.moe.copy_and_resolve_references()
    blocks.moe_lower.top_k_schedule = ((200, 4), (400, 2))


def _blockffn(m, blocks):
    """BlockFFN, arXiv 2507.08771."""
    m.layers = "attention/blockffn"
    blocks.blockffn.update(num_experts=24, hidden=16)


MODELS = {
    "mixtral": _mixtral,
    "qwen3_moe": _qwen3,
    "olmoe": _olmoe,
    "deepseek_v3": _deepseek_v3,
    "ling_mini": _ling_mini,
    "mole": _mole,
    "latent_moe": _latent_moe,
    "sigma": _sigma,
    "blockffn": _blockffn,
}


def _large(c):
    c.data.tokenizer = "bpe:32000"
    c.data.seq_len, c.data.batch_size = 4096, 1024
    c.model.remat = "full"
    c.optimizer.learning_rate = 3e-4
    c.optimizer.schedule.warmup_steps = 2000
    c.train.num_steps = 100_000
    c.eval.every_steps = c.checkpoint.every_steps = 1000


def _tiny(c):
    """Width 128, 4 layers, 16 experts of width 64; routers and layer patterns stay."""
    m, blocks = c.model, c.model.blocks
    m.width, m.depth, m.vocab_size = 128, 4, 0
    m.layers = m.layers.replace("3*latent_attention", "latent_attention")
    heads = blocks.attention.num_kv_heads and 1
    blocks.attention.update(num_heads=2, num_kv_heads=heads, head_dim=64)
    blocks.latent_attention.update(num_heads=2, latent_dim=32, q_latent_dim=48)
    blocks.latent_attention.update(nope_dim=32, rope_dim=16, v_dim=32)
    blocks.glu.hidden = 256
    blocks.moe.update(num_experts=16, hidden=64, top_k=min(blocks.moe.top_k, 4))
    if blocks.moe.num_groups > 1:
        blocks.moe.update(num_groups=4, top_groups=2)
    c.data.seq_len, c.data.batch_size = 256, 8
    c.optimizer.learning_rate = 2e-3
    c.optimizer.schedule.warmup_steps = 50
    c.train.num_steps = 500
