"""From a run, or the folder of a published model, to a run of the same model with MoLE layers."""

import pathlib
from typing import Any

import jax
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from effarch import config as config_lib
from effarch import config_check
from effarch.convert.hf import folder, weights
from effarch.convert.hf import runs as hf_runs
from effarch.convert.moe_to_latent import calibration, layers
from effarch.data import batches
from effarch.models import parameters
from effarch.models import state as state_lib
from effarch.parallel import mesh as mesh_lib
from effarch.training import restore, run_folder, setup

RECORD = "conversion.json"


def convert_run(
    source: pathlib.Path,
    target: pathlib.Path,
    options: layers.Options,
    *,
    base: ConfigDict | None = None,
    step: int | None = None,
) -> tuple[setup.Setup, list[dict[str, Any]]]:
    """Writes a run folder with the converted model as its checkpoint of step 0, and conversion.json.

    The source is a run (its newest checkpoint, or that of `step`) or a folder for transformers. `base`
    gives everything but the model; None: what the run has, or the default. Routers keep their bias and
    load. Returns the plan and `layers.arrays`' rows. Raises ValueError for what cannot be converted.
    """
    folder.refuse_held(target)
    model, config = _opened(source, target, base, step)
    wanted = layers.latent_model(config.model, options)
    config.model = wanted
    config = config_check.finish(config, num_devices=jax.device_count())
    mesh = mesh_lib.make(mesh_lib.resolve(config.mesh, jax.device_count()))
    plan = setup.on_mesh(config, mesh, vocab_size=model.embed.table.shape[0])
    moments = _moments(model, config, options.calibrate) if options.calibrate else None
    new, rows = layers.arrays(model, options, moments)
    state = _state(plan, model, new)
    run_folder.create(target, config, data=None)
    folder.copy_tokenizer(source, target)
    run_folder.write_json(target / RECORD, {"from": str(source), "lost": rows})
    with setup.open_checkpoints(plan, target) as saved:
        saved.save(0, state, {"resumes": -1, "seconds": 0.0})  # the first start is no resume
    return plan, rows


def is_run(source: pathlib.Path) -> bool:
    """Whether a folder's config.json is that of a run. Raises ValueError if there is none."""
    path = source / folder.CONFIG
    if not path.is_file():
        raise ValueError(f"--from={source} holds no config.json; give a model's folder or a run's.")
    return "fingerprint" in folder.read_json(path)


def _opened(source, target, base, step):
    """The model as it is, and the config of the new run but for its layers."""
    if not is_run(source):
        content = folder.read_config(source)
        folder.copy_tokenizer(source, target)
        base = config_lib.default() if base is None else base
        return weights.load(source), hf_runs.config_of(content, source, target, base)
    own = run_folder.read_config(source)
    if own.model.lora.rank:
        raise ValueError(
            f"{source} was trained with low-rank adapters; export it first, which merges them, and "
            "convert what was exported."
        )
    plan = hf_runs.planned(own)
    with setup.open_checkpoints(plan, source) as saved:
        restored = saved.restore(plan.target(), step=step)
    if restored is None:
        raise ValueError(f"{source} holds no checkpoint; train it first, or give another --from.")
    config = config_lib.from_json(config_lib.to_json(own if base is None else base))
    config.model = config_lib.from_json(config_lib.to_json(own)).model
    return restore.model_of(plan, restored[1]), config


def _moments(model, config, num_tokens: int) -> dict[int, np.ndarray]:
    """Of the first batches that the new run trains on."""
    data = config.data
    source = batches.training(batches.open_source(data), data, seed=config.seed)
    steps = -(-num_tokens // (data.batch_size * data.seq_len))
    found = (source.rows(step, 0, data.batch_size) for step in range(steps))
    return calibration.second_moments(model, found)


def _state(plan: setup.Setup, model, new: dict[str, np.ndarray]):
    """A fresh state with the model's arrays, those of `new` in the place of its experts."""
    _, params, _, model_state = nnx.split(model, nnx.Param, state_lib.Probe, ...)
    state = plan.init()
    old = {"params": nnx.to_pure_dict(params), "model_state": nnx.to_pure_dict(model_state)}
    trees = {}
    for name, tree in old.items():
        known = {
            parameters.path_of(path): leaf
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        }
        known |= new if name == "params" else {}
        trees[name] = jax.tree_util.tree_map_with_path(
            lambda path, leaf, known=known: _placed(known.get(parameters.path_of(path)), leaf),
            getattr(state, name),
        )
    return state._replace(**trees)


def _placed(array, like: jax.Array) -> jax.Array:
    """The array in the type and place of the fresh one; that one itself where there is none."""
    if array is None:
        return like
    assert array.shape == like.shape, (array.shape, like.shape)
    return jax.device_put(np.asarray(array).astype(like.dtype), like.sharding)
