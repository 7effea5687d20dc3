"""Sparse and structured feed-forwards and Spark attention beside their dense baselines.

    python -m effarch.train --config=configs/sparse.py:size=tiny,ffn=spark
    python -m effarch.train --config=configs/sparse.py:size=tiny,ffn=spark,mixer=spark,fraction=0.25

`ffn`, at equal parameters: glu (GeGLU, the baseline), spark, topk (the same threshold on all of the
gate), exact (by sorting), relu, relu2, drelu, q_sparse, poly_norm, mlp. With fewer: mlp factored as
low_rank, block_dense, block_shuffle or sltrain; `guided`: steps of their self-guided training.
`fraction`: active neurons of spark, topk and exact.
2b has the shape of Gemma 2 2B, which Spark Transformer starts from (arXiv 2506.06644).
"""

from effarch import config, names
from effarch.configs import machines, recipes
from effarch.models.ffns import glu

#        width depth heads
SIZES = {
    "tiny": (128, 4, 2),
    "50m": (512, 8, 8),
    "340m": (1024, 24, 16),
    "2b": (2304, 26, 8),
}
#          kind, hidden width over that of a gated layer of equal parameters, options
FFNS = {
    "glu": ("glu", 1, dict(activation="gelu_tanh")),
    "spark": ("spark_ffn", 1.5, {}),
    "topk": ("sparse_glu", 1, {}),
    "exact": ("sparse_glu", 1, dict(selection="exact")),
    "relu": ("sparse_glu", 1, dict(selection="none", activation="relu")),
    "relu2": ("sparse_glu", 1, dict(selection="none", activation="relu2")),
    "drelu": ("sparse_glu", 1, dict(selection="none", activation="relu", up_activation="relu")),
    "q_sparse": ("q_sparse", 1, {}),
    "poly_norm": ("mlp", 1.5, dict(activation="poly_norm")),
    "mlp": ("mlp", 1.5, {}),
    **{
        form: ("structured_mlp", 1.5, dict(form=form))
        for form in ("low_rank", "block_dense", "block_shuffle", "sltrain")
    },
}
MIXERS = {"attention": "attention", "spark": "spark_attention"}


def get_config(arg=""):
    switches = config.parse_arg(
        arg, size="tiny", ffn="spark", mixer="attention", fraction=0.08, guided=0, on=""
    )
    size, ffn = switches["size"], switches["ffn"]
    width, depth, num_heads = names.lookup(SIZES, size, "size")
    kind, wider, options = names.lookup(FFNS, ffn, "ffn")
    mixer = names.lookup(MIXERS, switches["mixer"], "mixer")
    c = recipes.language_model("1.3b" if size == "2b" else size)
    c.name = f"sparse-{ffn}-{switches['mixer']}-{size}"
    c.model.width, c.model.depth = width, depth
    c.model.layers = f"{mixer}/{kind}"
    c.model.blocks[mixer].num_heads = num_heads
    hidden = 4 * width if size == "2b" else glu.default_hidden(width)
    c.model.blocks[kind].update(options | dict(hidden=int(wider * hidden)))
    if ffn in ("spark", "topk", "exact"):
        c.model.blocks[kind].active_fraction = switches["fraction"]
    if kind == "structured_mlp":
        c.model.blocks[kind].guided_steps = switches["guided"]
    if size == "tiny":
        c.model.blocks.spark_attention.num_keys = 64
    if size == "2b":
        _gemma(c.model, mixer, kind)
    machines.place(c, switches["on"])
    return c


def _gemma(m, mixer: str, kind: str) -> None:
    """Gemma 2 2B, arXiv 2408.00118: norms around each branch, every other layer with a window."""
    m.tied_head, m.norm.placement, m.vocab_size = True, "peri", 256_128
    m.logit_softcap = 30.0
    m.blocks[mixer].update(num_kv_heads=4, head_dim=256)
    if mixer == "attention":
        m.blocks.attention.softcap = 50.0
    m.blocks.local = m.blocks[mixer].copy_and_resolve_references()
    m.blocks.local.window = 4096
    m.layers = f"local/{kind} + {mixer}/{kind}"
    m.blocks.spark_ffn.predictor_width = 1024
