"""The real train step of a config on a target: planned, lowered and compiled without data or devices."""

import jax
import jax.numpy as jnp

from effarch import config_check
from effarch.data import dataset, tokenizers
from effarch.kernels import platform
from effarch.parallel import topologies
from effarch.training import setup as setup_lib
from effarch.training import step as step_lib

BATCH = {
    "inputs": jnp.int32,
    "targets": jnp.int32,
    "segment_ids": jnp.int32,
    "positions": jnp.int32,
    "loss_weights": jnp.float32,
}


def plan(config, target: topologies.Target) -> setup_lib.Setup:
    """The run on the target, as `setup.prepare` would plan it there. Raises ValueError."""
    config = config_check.finish(config, num_devices=target.num_devices)
    mesh = topologies.mesh(target, config.mesh)
    with platform.tracing_for(target.device.platform):
        return setup_lib.on_mesh(config, mesh, vocab_size=vocab_size(config))


def vocab_size(config) -> int:
    """Words of the model: its own field, the prepared data's, or what the tokenizer is asked to have."""
    spec = config.data.tokenizer
    if config.model.vocab_size:
        return config.model.vocab_size
    if config.data.path:
        return dataset.open_dataset(config.data.path).vocab_size
    if spec.startswith("bpe:"):
        tokenizers.check(spec)
        return -(-int(spec.removeprefix("bpe:")) // 64) * 64
    return tokenizers.build(spec, lambda: iter(())).vocab_size


def lower(setup: setup_lib.Setup) -> jax.stages.Lowered:
    """The train step with abstract state and batch."""
    data = setup.config.data
    place = setup.layout.sharding(step_lib.BATCH_AXES)
    batch = {
        name: jax.ShapeDtypeStruct((data.batch_size, data.seq_len), dtype, sharding=place)
        for name, dtype in BATCH.items()
    }
    key = jax.eval_shape(lambda: jax.random.key(0))
    kind = setup.layout.mesh.devices.flat[0].platform
    with platform.tracing_for(kind), jax.sharding.set_mesh(setup.layout.mesh):
        return setup.train_step().lower(setup.target(), batch, key)
