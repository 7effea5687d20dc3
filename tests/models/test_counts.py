"""Parameter and FLOP counts against the formulas of the specification and published totals."""

import pytest

from effarch import config as config_lib
from effarch.configs import gated_deltanet, transformer
from effarch.models import accounting, build, ffns, mixers


def counts(config, vocab_size=32000, seq_len=4096):
    return accounting.count(build.abstract(config.model, vocab_size=vocab_size), seq_len)


@pytest.mark.parametrize(("size", "millions"), [("340m", 374), ("1.3b", 1364)])
def test_transformer_totals(size, millions):
    """Totals at vocabulary 32,000 with an untied head: DeltaNet paper's baselines."""
    total = counts(transformer.get_config(f"size={size}")).params_total
    assert round(total / 1e6) == millions


@pytest.mark.parametrize(("size", "millions"), [("340m", 380), ("1.3b", 1387)])
def test_gated_deltanet_totals(size, millions):
    total = counts(gated_deltanet.get_config(f"size={size}")).params_total
    assert round(total / 1e6) == millions


def test_gated_deltanet_layer_to_the_digit():
    """d (2HK + 3 HV V) + 2 d HV + 4 (2HK + HV V) + 2 HV + V, with two norms and a GLU beside it."""
    config = gated_deltanet.get_config("size=1.3b")
    d, h, k, v, hidden, depth = 2048, 6, 256, 512, 5632, 21
    mixer = d * (2 * h * k + 3 * h * v) + 2 * d * h + 4 * (2 * h * k + h * v) + 2 * h + v
    block = mixer + 3 * d * hidden + 2 * d
    assert counts(config).params_total == depth * block + d + 2 * 32000 * d


def test_attention_flops_are_the_causal_formula():
    """6 N + 6 S D L for forward and backward, N without the input table (arXiv 2406.19146)."""
    config = transformer.get_config("size=340m")
    found = counts(config, seq_len=2048)
    exact = 6 * found.params_matmul + 6 * 2048 * 1024 * 24
    assert found.flops_per_token == pytest.approx(exact, rel=1e-12)
    assert found.params_matmul == found.params_non_embedding + 1024 * 32000


def test_a_window_costs_its_mean_visible_length():
    config = transformer.get_config("size=340m")
    config.model.blocks.attention.window = 512
    found = counts(config, seq_len=2048)
    visible = 512 * (1 - 511 / 4096)
    assert found.flops_per_token == pytest.approx(
        6 * found.params_matmul + 12 * visible * 1024 * 24, rel=1e-12
    )


def test_recurrent_layers_cost_the_same_at_any_length():
    config = gated_deltanet.get_config("size=340m")
    short, long = counts(config, seq_len=1024), counts(config, seq_len=65536)
    assert short.flops_per_token == long.flops_per_token
    recurrence = 7 * 6 * 128 * 256 + 8 * (2 * 6 * 128 + 6 * 256)
    assert short.flops_per_token == pytest.approx(
        6 * short.params_matmul + 3 * 21 * recurrence, rel=1e-12
    )


PARTS = {
    **{kind: (f"{kind}/none", {}) for kind in mixers.KINDS},
    **{kind: (f"attention/{kind}", {}) for kind in ffns.KINDS},
    "feature maps": (
        "linear_attention/none",
        {"blocks.linear_attention.feature_map": "hedgehog"},
    ),
    "shared experts": (
        "attention/moe",
        {"blocks.moe.num_shared": 1, "blocks.moe.shared_gate": True},
    ),
    "adapters": ("attention/glu", {"lora.rank": 4}),
    "guided factors": (
        "attention/mlp",
        {"structured.form": "low_rank", "structured.rank": 8, "structured.guided_steps": 10},
    ),
}


@pytest.mark.parametrize("name", PARTS)
def test_a_matrix_costs_two_flops_for_each_weight_that_a_token_meets(name):
    """N_act and C count the same matrices; beside them a mixer's own part and its convolutions."""
    c = config_lib.default().model
    c.width, c.depth, (c.layers, fields) = 256, 1, PARTS[name]
    c.update_from_flattened_dict(fields)
    model = build.abstract(c, vocab_size=64)
    flops = accounting.flops_by_module(model, 128)
    own = ("layers/0/mixer", "layers/0/mixer/conv")
    found = accounting.count(model, 128)
    matrices = sum(value for path, value in flops.items() if path not in own)
    assert 2 * (found.params_active - 64 * 256) == matrices


def test_a_hybrid_costs_the_sum_of_its_layers():
    """Latent attention, a window, a recurrence, experts and a sparse ffn, however they are stacked."""
    blocks = ["latent_attention/glu", "gated_delta_net/moe", "local/spark_ffn"]
    c = config_lib.default().model
    c.width, c.blocks.local = 256, config_lib.block("attention", num_heads=4, window=32)
    names = ("params_non_embedding", "params_active", "flops_per_token", "flops_idle")

    def layers(text: str, depth: int) -> dict[str, float]:
        c.layers, c.depth = text, depth
        found = accounting.count(build.abstract(c, vocab_size=64), 128)
        head = {"params_active": 256 * 64, "flops_per_token": 6 * 256 * 64}
        return {name: getattr(found, name) - head.get(name, 0) for name in names}

    one, more, window = (layers(block, 1) for block in blocks)
    repeat = f"first: {blocks[0]}; repeat: 2*{blocks[1]} + {blocks[2]}"
    for c.scan in ("always", "never"):
        found = layers(repeat, 8)  # the last period is cut
        for name in names:
            assert found[name] == pytest.approx(one[name] + 5 * more[name] + 2 * window[name]), name
