"""Parameters and FLOPs of sparse layers at Gemma-2-2B's sizes, against formulas and published totals."""

import jax
import pytest
from flax import nnx

from effarch.configs import sparse
from effarch.models import accounting, build, ffns, mixers

WIDTH, GLU, SPARK = 2304, 9216, 13824


def layer(kind, **options):
    """(parameters, dense FLOPs, FLOPs in use) of a feed-forward per token."""
    ffn = nnx.eval_shape(lambda: ffns.KINDS[kind](WIDTH, rngs=nnx.Rngs(0), **options))
    parts = [node for _, node in nnx.iter_graph(ffn) if isinstance(node, nnx.Module)]
    dense = sum(p.forward_flops(1) for p in parts if hasattr(p, "forward_flops"))
    idle = ffn.idle_flops(1) if hasattr(ffn, "idle_flops") else 0
    return sum(x.size for x in jax.tree.leaves(nnx.state(ffn))), dense, dense - idle


def test_one_layer_of_gemma_2_2b():
    """127.40 M FLOPs of the gated layer, 36.24 M of the Spark layer with equal parameters."""
    params, dense, used = layer("glu", hidden=GLU, activation="gelu_tanh")
    assert params == 63_700_992 and dense == used == 127_401_984
    params, dense, used = layer("spark_ffn", hidden=SPARK, predictor_width=1024)
    assert params == 63_700_992 and dense == 127_401_984
    assert used == 2 * 1024 * 13824 + 2 * (2 * 2304 - 1024) * 1106 == 36_239_360
    for k, kind, options in (
        (461, "sparse_glu", dict(active_fraction=0.05)),
        (737, "sparse_glu", dict(selection="exact")),
    ):
        params, dense, used = layer(kind, hidden=GLU, **options)
        assert params == 3 * WIDTH * GLU
        assert (dense, used) == (6 * WIDTH * GLU, 2 * WIDTH * GLU + 4 * WIDTH * k)
    _, dense, used = layer("sparse_glu", hidden=GLU, selection="none", activation="relu")
    assert dense == used  # only a run shows how many are active
    params, dense, used = layer("q_sparse", hidden=GLU, active_fraction=0.6)
    assert (params, dense) == (3 * WIDTH * GLU, 6 * WIDTH * GLU)
    assert used == pytest.approx(0.6 * dense)
    assert layer("mlp", activation="poly_relu")[0] == 8 * WIDTH**2 + 4


def test_spark_attention():
    """2 H (P n + (2 K - P) k) for n visible and k chosen keys, both averaged over the row."""
    options = dict(num_heads=8, num_kv_heads=4, head_dim=256, predictor_dim=128)
    mixer = nnx.eval_shape(
        lambda: mixers.KINDS["spark_attention"](WIDTH, **options, rngs=nnx.Rngs(0))
    )
    plain = nnx.eval_shape(
        lambda: mixers.KINDS["attention"](WIDTH, num_heads=8, head_dim=256, rngs=nnx.Rngs(0))
    )
    length, k = 8192, 256
    dense, idle = mixer.forward_flops(length), mixer.idle_flops(length)
    assert dense == plain.forward_flops(length)
    chosen = k * (1 - (k - 1) / (2 * length))
    assert dense - idle == pytest.approx(2 * 8 * (128 * length / 2 + 384 * chosen))
    assert mixer.idle_flops(200) == 0  # no query sees more than 256 keys
    local = dict(options, window=100)
    mixer = nnx.eval_shape(
        lambda: mixers.KINDS["spark_attention"](WIDTH, **local, rngs=nnx.Rngs(0))
    )
    assert mixer.idle_flops(length) == 0


def test_reports_give_counts_with_and_without_the_head():
    """Both agree with sums over layers: Gemma-2-2B's shape as in the configs."""
    counts = {}
    for ffn, mixer in (("glu", "attention"), ("spark", "spark")):
        c = sparse.get_config(f"size=2b,ffn={ffn},mixer={mixer}")
        found = accounting.count(build.abstract(c.model, vocab_size=256_128), 4096)
        assert found.params_total == pytest.approx(2.61e9, rel=0.01)
        head = 2 * 2304 * 256_128
        forward = found.flops_forward
        for name in ("flops_forward", "flops_active"):
            assert forward[name] - forward[f"{name}_no_head"] == head
        assert forward["flops_forward"] == found.flops_per_token / 3
        counts[ffn] = forward
    assert counts["spark"]["flops_forward"] == counts["glu"]["flops_forward"]
    assert counts["glu"]["flops_active"] == counts["glu"]["flops_forward"]
    saved = 26 * (127_401_984 - 36_239_360)
    mixers_save = counts["spark"]["flops_forward"] - counts["spark"]["flops_active"] - saved
    assert 0 < mixers_save < 0.2 * saved
    ratio = counts["glu"]["flops_active_no_head"] / counts["spark"]["flops_active_no_head"]
    with_head = counts["glu"]["flops_active"] / counts["spark"]["flops_active"]
    assert 2.2 < ratio < 2.6 and 1.7 < with_head < 2.0  # the paper gives 2.5
