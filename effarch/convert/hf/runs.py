"""Between folders of published models and run folders."""

import pathlib

import jax
from flax import nnx
from ml_collections import ConfigDict

from effarch import config as config_lib
from effarch import config_check
from effarch.convert import hf
from effarch.convert.hf import family as family_lib
from effarch.convert.hf import folder, tokenizer_files, weights
from effarch.data import tokenizers
from effarch.models.layers import adapter
from effarch.parallel import mesh as mesh_lib
from effarch.training import restore, run_folder, setup
from effarch.training import state as state_lib


def import_run(source: pathlib.Path, target: pathlib.Path, base: ConfigDict) -> setup.Setup:
    """Writes a run folder with the model at `source` as its checkpoint of step 0.

    `base` gives everything but the model: data, optimizer, steps, recipes, adapters. The tokenizer is
    the model's own if `source` has one. Raises ValueError for what effarch cannot hold.
    """
    folder.refuse_held(target)
    content = folder.read_config(source)
    config = config_of(content, source, target, base)
    config = config_check.finish(config, num_devices=jax.device_count())
    mesh = mesh_lib.make(mesh_lib.resolve(config.mesh, jax.device_count()))
    plan = setup.on_mesh(config, mesh, vocab_size=config.model.vocab_size)
    state = plan.init()
    params, model_state = weights.read(
        source, config.model, plan.plan, state.params, state.model_state
    )
    state = state._replace(params=params, model_state=model_state)
    run_folder.create(target, config, data=None)
    folder.copy_tokenizer(source, target)
    run_folder.write_json(target / folder.PUBLISHED, content)
    with setup.open_checkpoints(plan, target) as saved:
        saved.save(0, state, {"resumes": -1, "seconds": 0.0})  # the first start is no resume
    return plan


def export_run(
    run: pathlib.Path,
    target: pathlib.Path,
    *,
    step: int | None = None,
    family: str = "",
    dtype: str = "float32",
) -> str:
    """Writes the model of a run as a folder for transformers; returns its family's name.

    Adapters are merged. Raises ValueError if no family can express the model.
    """
    folder.refuse_held(target)
    config = run_folder.read_config(run)
    plan = planned(config)
    model = config_lib.from_json(config_lib.to_json(config)).model
    model.vocab_size, model.lora.rank = plan.vocab_size, 0
    chosen, content = hf.of_model(model, family)
    with setup.open_checkpoints(plan, run) as saved:
        restored = saved.restore(plan.target(), step=step)
    if restored is None:
        raise ValueError(f"{run} holds no checkpoint; train it first, or give another --from.")
    state = _merged(plan, restored[1]) if config.model.lora.rank else restored[1]
    document = _tokenizer(config, plan, run, target)
    content |= _texts(config, run, document, is_tuned=int(state.step) > 0)
    weights.write(target, content, model, plan.plan, state, dtype=dtype)
    return chosen.model_type


def config_of(content: dict, source: pathlib.Path, target: pathlib.Path, base) -> ConfigDict:
    """`base` with the model of the config.json `content` and, where `source` has one, its tokenizer."""
    config = config_lib.from_json(config_lib.to_json(base))
    model = family_lib.read_config(hf.of_config(content), content)
    for name in family_lib.TRAINING_ONLY & set(model):
        model[name] = config.model[name]
    config.model = model
    if config.name == config_lib.default().name:
        config.name = source.resolve().name
    if (source / folder.TOKENIZER).is_file() and not config.data.path:
        config.data.tokenizer = _tokenizer_spec(content, source, target)
    return config


def _tokenizer_spec(content: dict, source: pathlib.Path, target: pathlib.Path) -> str:
    """`file:PATH#TOKEN`: documents begin with the model's first token, or its last if it has none."""
    described = folder.read_json(source / folder.TOKENIZER)
    added = {token["id"]: token["content"] for token in described.get("added_tokens") or ()}
    ids = [content.get("bos_token_id"), content.get("eos_token_id")]
    ids = [number[0] if isinstance(number, list) else number for number in ids]
    document = next((added[number] for number in ids if number in added), None)
    path = f"file:{target.resolve() / folder.TOKENIZER}"
    return f"{path}#{document}" if document else path


def planned(config) -> setup.Setup:
    """The plan without data where the config says how many words there are."""
    if not config.model.vocab_size:
        return setup.prepare(config)
    mesh = mesh_lib.make(mesh_lib.resolve(config.mesh, jax.device_count()))
    return setup.on_mesh(config, mesh, vocab_size=config.model.vocab_size)


def _merged(plan: setup.Setup, state: state_lib.TrainState) -> state_lib.TrainState:
    """The state of the same model without adapters."""
    model = restore.model_of(plan, state)
    adapter.merge(model)
    return state._replace(params=nnx.to_pure_dict(nnx.state(model, nnx.Param)))


def _tokenizer(config, plan: setup.Setup, run: pathlib.Path, target: pathlib.Path) -> int | None:
    """Writes the tokenizer's files; its document token, if there is a tokenizer."""
    spec = config.data.tokenizer
    if folder.copy_tokenizer(run, target):
        found = tokenizers.build(spec, lambda: iter(())) if spec.startswith("file:") else None
    else:
        found = getattr(plan.dataset, "tokenizer", None)
        if found is not None:
            tokenizer_files.write(found, target)
    return None if found is None else found.document_token


def _texts(config, run: pathlib.Path, document: int | None, *, is_tuned: bool) -> dict:
    """The fields of config.json on the ends and the length of texts.

    A published model keeps its own; once tuned, it ends texts by the document token as well.
    """
    found = {"max_position_embeddings": config.data.seq_len}
    found |= {} if document is None else dict.fromkeys(("bos_token_id", "eos_token_id"), document)
    if not (run / folder.PUBLISHED).is_file():
        return found
    published = folder.read_json(run / folder.PUBLISHED)
    found |= {name: published[name] for name in folder.KEPT_FIELDS if name in published}
    if is_tuned and document is not None:
        ends = found["eos_token_id"]
        ends = [] if ends is None else ends if isinstance(ends, list) else [ends]
        ends = [*ends, *({document} - set(ends))]
        found["eos_token_id"] = ends if len(ends) > 1 else document
    return found
