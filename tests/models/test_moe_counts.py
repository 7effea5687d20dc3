"""Parameters and FLOPs of mixture-of-experts models, to the digit, against published totals."""

import pytest

from effarch import config, config_check
from effarch.configs import moe
from effarch.models import accounting, build

#            total, what one token uses (embeddings, norms and router biases included in both)
PUBLISHED = {
    "mixtral": (46_702_792_704, 12_879_925_248),
    "qwen3_moe": (30_532_122_624, 3_353_032_704),
    "olmoe": (6_919_161_856, 1_282_017_280),
    "ling_mini": (16_255_643_392, 1_432_973_056),
    "deepseek_v3": (671_026_419_200, 37_552_297_472),
}


def counts(c, seq_len=4096):
    vocab_size = c.model.vocab_size or 4096
    return accounting.count(build.abstract(c.model, vocab_size=vocab_size), seq_len)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_totals(name):
    found = counts(moe.get_config(f"size={name}"))
    idle = found.params_matmul - found.params_active
    assert (found.params_total, found.params_total - idle) == PUBLISHED[name]


def test_ling_mini_without_embeddings():
    """789 M: the README's figure leaves out the table and the head."""
    found = counts(moe.get_config("size=ling_mini"))
    idle = found.params_matmul - found.params_active
    assert found.params_total - idle - 2 * 157184 * 2048 == 789_147_392


D, E, K, F, SHARED = 64, 16, 4, 24, 2
LAYER = 4 * D * D + 2 * D  # attention and two norms


def one_layer(kind, **options):
    """Total, matmul and active parameters of the ffn and its forward FLOPs per token."""
    c = config.default()
    c.model.width, c.model.depth, c.model.layers = D, 1, f"attention/{kind}"
    c.model.blocks.attention.num_heads = 2
    c.model.blocks[kind].update(num_experts=E, hidden=F, **options)
    model = build.abstract(c.model, vocab_size=8)
    found = accounting.count(model, 128)
    flops = accounting.flops_by_module(model, 128)
    ffn_flops = sum(value for path, value in flops.items() if "/ffn" in path)
    outside = LAYER + 8 * D + D  # table (tied) and final norm
    active = found.params_active - 4 * D * D - 8 * D
    return found.params_total - outside, active, ffn_flops


def test_standard_layer():
    found = one_layer("moe", top_k=K, num_shared=SHARED)
    assert found == (
        3 * D * F * E + D * E + 3 * D * F * SHARED,
        3 * D * F * K + D * E + 3 * D * F * SHARED,
        6 * D * F * K + 2 * D * E + 6 * D * F * SHARED,
    )


def test_the_router_bias_is_counted_and_does_no_work():
    plain = one_layer("moe", top_k=K)
    biased = one_layer("moe", top_k=K, router="sigmoid_bias")
    assert biased == (plain[0] + E, *plain[1:])


@pytest.mark.parametrize("tie_in", [False, True])
@pytest.mark.parametrize("factor", ["up_gate", "all"])
def test_mole(factor, tie_in):
    """E (2 F L + F D) + 2 G L D, and 3 E F L + 3 G L D; a token sees at most min(K, G) groups."""
    L, size = 20, 4
    G, g = E // size, min(K, E // size)
    options = dict(group_size=size, latent=L, factor=factor, tie_in=tie_in, top_k=K)
    total, active, flops = one_layer("mole", **options)
    if factor == "up_gate":
        want = E * (2 * F * L + F * D) + 2 * G * L * D
        want_flops = 4 * g * L * D + 4 * K * L * F + 2 * K * F * D
    else:
        want = 3 * E * F * L + 3 * G * L * D
        want_flops = 6 * g * L * D + 6 * K * L * F
    assert total == want - tie_in * G * L * D + D * E
    assert flops == want_flops - tie_in * 2 * g * L * D + 2 * D * E
    assert active == flops / 2


def test_mole_with_groups_of_the_router():
    """Two of four routing groups of 4 experts: a token's 4 experts lie in at most 2 latent groups."""
    options = dict(group_size=4, latent=20, top_k=K)
    _, _, free = one_layer("mole", **options)
    _, _, limited = one_layer("mole", num_groups=4, top_groups=2, **options)
    assert free - limited == 4 * (4 - 2) * 20 * D


@pytest.mark.parametrize("is_gated", [True, False])
def test_latent_moe(is_gated):
    L, matrices = 16, 2 + is_gated
    total, active, flops = one_layer("latent_moe", top_k=K, latent=L, is_gated=is_gated)
    assert total == E * matrices * L * F + 2 * D * L + D * E
    assert flops == 2 * matrices * K * L * F + 4 * D * L + 2 * D * E
    assert active == flops / 2


def test_blockffn():
    total, _, flops = one_layer("blockffn")
    assert total == 2 * D * F * E + D * E + E
    assert flops == 4 * D * F * E + 2 * D * E


@pytest.mark.parametrize("name", list(moe.MODELS))
def test_tiny_configs_are_small_and_checked(name):

    c = moe.get_config(f"size={name}_tiny")
    config_check.finish(c, num_devices=1)
    assert counts(c).params_total < 6e6
