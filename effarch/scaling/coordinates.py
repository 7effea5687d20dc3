"""Coordinate checks: how large what each mixer and ffn adds is, after a few steps, at several widths.

Under a parametrization that transfers (effarch/scaling/mup.py) the sizes do not depend on the width; in
the standard one they grow with it (arXiv 2203.03466, figure 5). Over the depth it is the change of the
stream in a step that stays as it is, and without factors grows with it (arXiv 2310.02244, 2505.01618).
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from effarch import config_check
from effarch.models import language_model, parameters
from effarch.models.context import Context
from effarch.parallel import mesh as mesh_lib
from effarch.training import setup


def record(
    config, *, steps: Sequence[int] = (1, 2, 5), vocab_size: int = 64, seed: int = 0
) -> dict[int, dict[str, float]]:
    """{step: {"layers/0/mixer": mean |x|, ..., "logits": ...}} of a model trained on one random batch.

    x is what a mixer or ffn adds to the stream, on the batch that is trained on; logits are float32.
    """
    plan, batch = _prepared(config, vocab_size, seed)
    state, train, measure = plan.init(), plan.train_step(quantized=False), _measure(plan, sizes)
    key = jax.random.key(seed)
    found = {}
    for step in range(1, max(steps) + 1):
        state, _ = train(state, batch, key)
        if step in steps:
            now = jax.device_get(measure(state, batch["inputs"]))
            found[step] = {name: float(value) for name, value in now.items()}
    return found


def changes(config, *, steps: int = 4, vocab_size: int = 64, seed: int = 0) -> list[float]:
    """Mean |change| of the stream after the last layer in each step, on the one batch of `record`."""
    plan, batch = _prepared(config, vocab_size, seed)
    state, train, measure = plan.init(), plan.train_step(quantized=False), _measure(plan, stream)
    key = jax.random.key(seed)
    found, before_BTD = [], measure(state, batch["inputs"])
    for _ in range(steps):
        state, _ = train(state, batch, key)
        now_BTD = measure(state, batch["inputs"])
        found.append(float(jnp.mean(jnp.abs(now_BTD - before_BTD))))
        before_BTD = now_BTD
    return found


def spread(records: Sequence[dict[int, dict[str, float]]]) -> dict[tuple[int, str], float]:
    """Largest / smallest over the widths of every coordinate, by step and name."""
    return {
        (step, name): max(one[step][name] for one in records)
        / min(one[step][name] for one in records)
        for step in records[0]
        for name in records[0][step]
    }


def sizes(model: language_model.LanguageModel, tokens_BT: jax.Array) -> dict[str, jax.Array]:
    """Mean magnitude of what each mixer and each ffn adds to the stream, and of the logits."""
    ctx = Context(train=False)
    x_BTD = model.embed(tokens_BT, ctx)
    found = {}
    for run in model.runs:
        split = {name: nnx.split(model.layers[name]) for name in run}
        for repeat in range(len(parameters.stack_layers(run[0]))):
            for name in run:
                graphdef, state = split[name]
                one = jax.tree.map(lambda leaf: leaf[repeat], nnx.to_pure_dict(state))  # noqa: B023
                layer = parameters.stack_layers(name)[repeat]
                for part, after_BTD in _branches(nnx.merge(graphdef, one), x_BTD, ctx):
                    found[f"layers/{layer}/{part}"] = jnp.mean(jnp.abs(after_BTD - x_BTD))
                    x_BTD = after_BTD
    x_BTD = model.final_norm(x_BTD) if model.final_norm is not None else x_BTD
    found["logits"] = jnp.mean(jnp.abs(model.logits(model.logit_scale * x_BTD)))
    return found


def _branches(block, x_BTD: jax.Array, ctx: Context):
    """The stream after a block's mixer and, if it has one, after its ffn."""
    y_BTD, _, _ = block.mixer(block.mixer_residual.enter(x_BTD, ctx), ctx, None)
    x_BTD = block.mixer_residual.leave(x_BTD, y_BTD, ctx)
    yield "mixer", x_BTD
    if block.ffn is not None:
        y_BTD, _ = block.ffn(block.ffn_residual.enter(x_BTD, ctx), ctx)
        yield "ffn", block.ffn_residual.leave(x_BTD, y_BTD, ctx)


def stream(model: language_model.LanguageModel, tokens_BT: jax.Array) -> jax.Array:
    """The stream [B,T,D] after the last layer, before the final norm."""
    model.final_norm, model.logit_scale = None, 1.0
    return model(tokens_BT, Context(train=False))[0]


def _prepared(config, vocab_size: int, seed: int):
    """The plan of a config and its random batch on the devices."""
    config = config_check.finish(config, num_devices=jax.device_count())
    mesh = mesh_lib.make(mesh_lib.resolve(config.mesh, jax.device_count()))
    plan = setup.on_mesh(config, mesh, vocab_size=vocab_size)
    rows, length = config.data.batch_size, config.data.seq_len
    return plan, plan.feeder(_batch(rows, length, vocab_size, seed))


def _measure(plan: setup.Setup, function):
    """(state, tokens) -> `function(model, tokens)`, compiled once."""
    blueprint = plan.plan
    probes = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), blueprint.probes)

    def measure(state, tokens):
        parts = (state.params, probes, state.model_state)
        return function(nnx.merge(blueprint.graphdef, *parts), tokens)

    return jax.jit(measure)


def _batch(rows: int, length: int, vocab_size: int, seed: int):
    draw = np.random.default_rng(seed)
    tokens = draw.integers(0, vocab_size, (rows, length + 1)).astype(np.int32)
    batch = {
        "inputs": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "segment_ids": np.ones((rows, length), np.int32),
        "positions": np.tile(np.arange(length, dtype=np.int32), (rows, 1)),
        "loss_weights": np.ones((rows, length), np.float32),
    }
    return lambda start, stop: {name: array[start:stop] for name, array in batch.items()}
