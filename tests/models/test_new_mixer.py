"""A newcomer's mixer: one class and one registry line, and it is configured, trained and counted."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from effarch import config, config_check
from effarch.kernels import vector_recurrence
from effarch.models import accounting, build, mixers
from effarch.models.context import Context
from effarch.models.layers import linear


class MovingAverage(nnx.Module):
    """y = (exponential moving average of x W_in) W_out, written against the public parts alone."""

    def __init__(self, width: int, *, decay: float = 0.9, dtype=jnp.float32, rngs: nnx.Rngs):
        self.decay = decay
        self.inside = linear.Linear(width, width, axes=("embed", "heads"), dtype=dtype, rngs=rngs)
        self.out = linear.Linear(width, width, axes=("heads", "embed"), dtype=dtype, rngs=rngs)

    def __call__(self, x_BTD, ctx: Context, cache=None):
        new = (1 - self.decay) * self.inside(x_BTD)
        h, state = vector_recurrence(
            new,
            jnp.full(new.shape, np.log(self.decay), jnp.float32),
            initial_state=None if cache is None else cache["state"],
            segment_ids=ctx.segment_ids,
        )
        return self.out(h), None if cache is None else {"state": state}, {}

    def init_cache(self, batch: int, length: int) -> dict:
        return {"state": jnp.zeros((batch, self.out.sizes[0]))}

    def forward_flops(self, seq_len: int) -> float:
        return 2.0 * self.out.sizes[0]


def test_a_registry_line_is_all_it_takes(monkeypatch):
    monkeypatch.setitem(mixers.KINDS, "moving_average", MovingAverage)
    c = config.default()
    c.model.width, c.model.depth, c.model.layers = 16, 1, "moving_average/glu"
    c.model.blocks.moving_average.decay = 0.8
    finished = config_check.finish(c)
    model = build.model(finished.model, vocab_size=11, rngs=nnx.Rngs(0))
    found = accounting.flops_by_module(model, 32)
    assert any(path.endswith("mixer") and flops == 2 * 16 for path, flops in found.items())

    graphdef, state = nnx.split(model)
    tokens = np.random.default_rng(0).integers(0, 11, (2, 24)).astype(np.int32)
    batch = dict(
        inputs=tokens,
        targets=np.roll(tokens, -1, axis=1),
        segment_ids=np.repeat([1, 2], 12)[None].repeat(2, axis=0).astype(np.int32),
        positions=np.tile(np.arange(12, dtype=np.int32), (2, 2)),
        loss_weights=np.ones((2, 24), np.float32),
    )

    @jax.jit
    def gradients(params):
        return jax.value_and_grad(
            lambda params: nnx.merge(graphdef, params).loss(batch, Context())[0]
        )(params)

    loss, grads = gradients(nnx.to_pure_dict(state))
    assert np.isfinite(loss)
    assert all(np.any(grad != 0) for grad in jax.tree.leaves(grads))
    cache = jax.eval_shape(lambda: model.init_cache(3, 100))
    assert [leaf.shape for leaf in jax.tree.leaves(cache)] == [(1, 3, 16)]
