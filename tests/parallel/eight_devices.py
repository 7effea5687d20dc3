"""Run by test_eight_devices.py in a process of its own: one model on one device and on meshes of eight.

Prints a JSON line a mesh: how far the first loss, every gradient of the first step and the losses of
four steps are from those of one device.
"""

import json
import os
import sys

os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
)

import jax
import numpy as np
import optax

from effarch import config
from effarch.models import parameters
from effarch.parallel import mesh, sharding
from effarch.training import guard, state, step

LAYERS = {
    "transformer": "attention/glu",
    "hybrid": "gated_delta_net/glu + attention/glu",
    "gates": "kda/none + mamba2/none + local/none",
    "decays": "retnet/none + gla/none + latent_attention/none + linear_attention/none",
    "channels": "hgrn/none + hgrn2/none + delta_net/none",
    "sparse": "spark_attention/spark_ffn + attention/sparse_glu",
}
VOCAB, ROWS, LENGTH, STEPS = 64, 8, 64, 4
RATE = 0.1


def model_config(name):
    c = config.default()
    c.model.layers, c.model.depth, c.model.width = LAYERS[name], LAYERS[name].count("+") + 1, 64
    c.model.blocks.attention.update(num_heads=8, head_dim=8, qk_norm=True)
    c.model.blocks.gated_delta_net.update(num_heads=8, head_dim=8, expand_v=1.0, chunk_size=16)
    c.model.blocks.glu.hidden = c.model.blocks.sparse_glu.hidden = 64
    c.model.blocks.spark_attention.update(num_heads=8, head_dim=8, num_keys=12)
    c.model.blocks.spark_ffn.hidden = 96
    c.model.blocks.kda.update(num_heads=8, head_dim=8, chunk_size=16, learnable_initial_state=True)
    c.model.blocks.local = config.block("attention", num_heads=8, head_dim=8, window=11)
    c.model.blocks.mamba2.update(head_dim=16, state_dim=8, chunk_size=16)
    for kind in ("retnet", "gla", "linear_attention"):
        c.model.blocks[kind].update(num_heads=8, chunk_size=16)
    for kind in ("hgrn2", "delta_net"):
        c.model.blocks[kind].update(head_dim=8, chunk_size=16)
    c.model.blocks.latent_attention.update(
        num_heads=8, latent_dim=16, nope_dim=8, rope_dim=4, v_dim=8
    )
    c.model.z_loss = 1e-3
    c.model.init_std = 0.1  # so that every part matters
    c.model.scan = "always"
    return c.model


def batches():
    draw = np.random.default_rng(0)
    for _ in range(STEPS):
        tokens = draw.integers(0, VOCAB, (ROWS, LENGTH + 1), np.int32)
        starts = draw.random((ROWS, LENGTH)) < 0.05
        starts[:, 0] = True
        place = np.arange(LENGTH, dtype=np.int32)
        segment_ids = np.cumsum(starts, axis=1, dtype=np.int32)
        segment_ids[0, -5:] = segment_ids[1, 20:37] = 0  # padding: at the end, over whole pieces
        weights = (draw.random((ROWS, LENGTH)) < 0.9) & (segment_ids != 0)
        yield {
            "inputs": tokens[:, :-1],
            "targets": tokens[:, 1:],
            "segment_ids": segment_ids,
            "positions": place - np.maximum.accumulate(np.where(starts, place, 0), axis=1),
            "loss_weights": weights.astype(np.float32),
        }


# The trace without memory holds the gradient itself, sharded as the parameter is.
TX = guard.guard(optax.chain(optax.trace(0.0), optax.scale(-RATE)), spike_factor=0.0)


def start(model):
    """The state before the first step, on one device: what is compared is the step."""
    return jax.jit(lambda key: state.initial(model, vocab_size=VOCAB, seed=key, tx=TX))(
        jax.random.key(0)
    )


def train(model, values, shape):
    """Losses of the steps and the gradients of the first one, from plain gradient descent."""
    devices = jax.devices()[: int(np.prod([*shape.values()]))]
    layout = sharding.Layout(mesh.make({**dict.fromkeys(mesh.AXES, 1), **shape}, devices))
    plan = state.blueprint(model, vocab_size=VOCAB)
    places = state.shardings(values, plan, layout)
    values = jax.device_put(values, places)
    one_step = jax.jit(
        step.train_step(plan, TX, lambda count: RATE, accumulate=1, layout=layout),
        in_shardings=(places, layout.sharding(step.BATCH_AXES), None),
        out_shardings=(places, layout.sharding(())),
    )
    losses, gradients = [], None
    for batch in batches():
        values, metrics = one_step(values, batch, jax.random.key(1))
        losses.append(float(metrics["loss"]))
        if gradients is None:
            gradients = jax.device_get(values.opt_state)
    return losses, gradients


def compare(one, other):
    flat = dict(jax.tree_util.tree_leaves_with_path(one[1]))
    errors = {
        parameters.path_of(path): float(
            np.linalg.norm(leaf - flat[path]) / max(np.linalg.norm(flat[path]), 1e-12)
        )
        for path, leaf in jax.tree_util.tree_leaves_with_path(other[1])
        if leaf.ndim
    }
    worst = max(errors, key=errors.get)
    return {
        "first_loss": abs(other[0][0] - one[0][0]) / one[0][0],
        "losses": max(abs(a - b) for a, b in zip(one[0], other[0])),
        "gradient": errors[worst],
        "worst": worst,
        "leaves": len(errors),
        "fall": one[0][0] - one[0][-1],
    }


if __name__ == "__main__":
    name, *meshes = sys.argv[1:]
    model = model_config(name)
    values = start(model)
    single = train(model, values, {})
    for text in meshes:
        shape = {axis: int(size) for axis, size in (part.split("=") for part in text.split(","))}
        print(
            json.dumps({"mesh": text, **compare(single, train(model, values, shape))}), flush=True
        )
