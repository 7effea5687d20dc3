"""effarch's side: the jitted train step exactly as `effarch.train` runs it, on random tokens."""

from collections.abc import Callable

import jax
import shapes

from effarch import config, config_check, experiment_runs
from effarch.parallel import mesh as mesh_lib
from effarch.training import freed_memory
from effarch.training import setup as setup_lib

LAYERS = {"llama": "attention/glu", "hybrid": "3*gated_delta_net/glu + attention/glu"}


def build(case: shapes.Case) -> tuple[Callable[[], None], int]:
    """A function that makes one step and waits for it, and the number of parameters."""
    freed_memory.keep()
    setup = _setup(case)
    state, step = setup.init(), setup.train_step()
    batch = experiment_runs.random_batch(case.rows, case.seq_len, shapes.VOCAB)
    key = jax.random.key(0)
    options = {"state": state}

    def one() -> None:
        options["state"], metrics = step(options["state"], batch, key)
        jax.block_until_ready(metrics)

    return one, setup.counts.params_total


def _setup(case: shapes.Case) -> setup_lib.Setup:
    c = config.default()
    c.model.width, c.model.depth = shapes.WIDTH, shapes.DEPTH
    c.model.layers, c.model.dtype = LAYERS[case.model], case.dtype
    c.model.tied_head = False
    c.model.vocab_size = shapes.VOCAB
    c.model.blocks.glu.hidden = shapes.HIDDEN
    c.model.blocks.attention.update(num_heads=shapes.HEADS)
    if case.model == "hybrid":
        c.model.blocks.attention.update(qk_norm=True, use_gate=True, rope_fraction=0.25)
    c.model.blocks.gated_delta_net.update(
        num_heads=shapes.HEADS, head_dim=shapes.HEAD_DIM, expand_v=1.0
    )
    c.data.tokenizer = "bytes"
    c.data.seq_len, c.data.batch_size = case.seq_len, case.rows
    c.optimizer.learning_rate = 1e-4
    c = config_check.finish(c, num_devices=1)
    mesh = mesh_lib.make(mesh_lib.resolve(c.mesh, 1))
    return setup_lib.on_mesh(c, mesh, vocab_size=shapes.VOCAB)
