"""Checks a config before anything is compiled: names, types, ranges and what must fit together.

Every error is a ValueError of one sentence with field, value and remedy.
"""

from typing import Any

from ml_collections import ConfigDict

from effarch import config as config_lib
from effarch import names
from effarch.data import tasks
from effarch.models import build, ffns, layer_language, mixers, registry, remat
from effarch.models.layers import structures
from effarch.parallel import mesh as mesh_lib
from effarch.quantization import recipes
from effarch.training import optimizers, schedules

POSITIVE = (
    "checkpoint.keep",
    "data.batch_size",
    "data.seq_len",
    "data.task.num_validation",
    "log.every_steps",
    "model.depth",
    "model.embed_scale",
    "model.logit_scale",
    "model.lora.alpha",
    "model.norm.eps",
    "model.residual_scale",
    "model.structured.scale",
    "model.width",
    "optimizer.learning_rate",
    "train.accumulate",
    "train.max_bad_steps",
    "train.num_steps",
)
NOT_NEGATIVE = (
    "checkpoint.every_steps",
    "checkpoint.keep_period",
    "data.task.num_examples",
    "data.val_permille",
    "eval.every_steps",
    "eval.max_batches",
    "hosts.timeout_seconds",
    "log.sample_tokens",
    "model.init_std",
    "model.lora.rank",
    "model.structured.blocks",
    "model.structured.guided_steps",
    "model.structured.rank",
    "model.vocab_size",
    "model.z_loss",
    "optimizer.clip_norm",
    "optimizer.schedule.warmup_steps",
    "quantization.anneal_reach",
    "quantization.anneal_steps",
    "quantization.keep_first",
    "quantization.keep_last",
    "quantization.metrics_every",
    "quantization.saved_group",
    "quantization.start_step",
    "quantization.tail_steps",
    "seed",
    "train.spike_factor",
)
CHOICES = {
    "model.dtype": ("auto", *build.DTYPES),
    "model.param_dtype": tuple(build.DTYPES),
    "model.scan": ("auto", "always", "never"),
    "model.structured.form": ("none", *structures.FORMS),
    "model.norm.placement": ("pre", "post", "peri"),
    "optimizer.kind": tuple(optimizers.KINDS),
    "optimizer.schedule.kind": tuple(schedules.KINDS),
    "quantization.recipe": tuple(recipes.KINDS),
}


def finish(config: ConfigDict, *, num_devices: int | None = None):
    """Checks the config and returns it frozen; with `num_devices` mesh and batch as well."""
    checked = config_lib.from_json(config_lib.to_json(config))
    _check_fields(checked, config_lib.default(), "")
    _check_blocks(checked)
    known = dict.fromkeys(("none", *tasks.KINDS))
    names.lookup(known, checked.data.task.name, "data.task.name")
    for field in POSITIVE:
        _require(_get(checked, field) > 0, field, checked, "must be above 0")
    for field in NOT_NEGATIVE:
        _require(_get(checked, field) >= 0, field, checked, "must not be negative")
    for field, known in CHOICES.items():
        names.lookup(dict.fromkeys(known), _get(checked, field), field)
    remat.policy(checked.model.remat)
    _check_batch(checked, num_devices)
    return config_lib.freeze(checked)


def _get(config: ConfigDict, field: str) -> Any:
    for name in field.split("."):
        config = config[name]
    return config


def _require(holds: bool, field: str, config: ConfigDict, remedy: str) -> None:
    if not holds:
        raise ValueError(f"{field}={_get(config, field)} {remedy}.")


def _check_fields(config: ConfigDict, known: ConfigDict, prefix: str) -> None:
    """Same names and types as `known`, recursively; blocks are checked by kind."""
    for name in config:
        if name not in known:
            raise ValueError(
                f"{prefix}{name} is not a config field. {names.did_you_mean(name, known)}"
            )
    for name in known:
        field = prefix + name
        if name not in config:
            raise ValueError(f"{field} is missing; start the config from effarch.config.default().")
        if field == "model.blocks":
            continue
        if isinstance(known[name], ConfigDict):
            if not isinstance(config[name], ConfigDict):
                raise ValueError(f"{field}={config[name]!r} must be a section, not a value.")
            _check_fields(config[name], known[name], field + ".")
        else:
            config[name] = _checked_type(config[name], known, name, field)


def _checked_type(value, known: ConfigDict, name: str, field: str):
    """The value, an int made a float where a float is due; None only where it is a choice."""
    expected, optional = known.get_type(name), known[name] is None
    if value is None and optional:
        return None
    if expected is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, expected) or (expected is int and isinstance(value, bool)):
        raise ValueError(f"{field}={value!r} must be of type {expected.__name__}.")
    return value


def _check_blocks(config: ConfigDict) -> None:
    """Sections have a known kind and its options; the layer text names mixers and ffns."""
    kinds = {**mixers.KINDS, **ffns.KINDS}
    blocks = config.model.blocks
    for name, section in blocks.items():
        field = f"model.blocks.{name}"
        if not isinstance(section, ConfigDict):
            raise ValueError(f"{field}={section!r} must be a section, not a value.")
        if "kind" not in section:
            raise ValueError(f"{field} has no kind. {names.did_you_mean('', kinds)}")
        names.lookup(kinds, section.kind, f"{field}.kind")
        known = registry.section(kinds[section.kind])
        known.kind = section.kind
        _check_fields(section, known, field + ".")
    for number, layer in enumerate(layer_language.layers(config.model.layers, config.model.depth)):
        _check_name(blocks, layer.mixer, mixers.KINDS, "mixer", number)
        if layer.ffn != "none":
            _check_name(blocks, layer.ffn, ffns.KINDS, "ffn", number)


def _check_name(blocks: ConfigDict, name: str, kinds, role: str, number: int) -> None:
    fitting = [section for section in blocks if blocks[section].kind in kinds]
    if name not in fitting:
        raise ValueError(
            f"model.layers: {name!r} (layer {number}) is not the {role} of any section of "
            f"model.blocks. {names.did_you_mean(name, fitting)}"
        )


def _check_batch(config: ConfigDict, num_devices: int | None) -> None:
    batch, accumulate = config.data.batch_size, config.train.accumulate
    if batch % accumulate:
        raise ValueError(
            f"data.batch_size={batch} is not a multiple of train.accumulate={accumulate}; "
            f"use for example data.batch_size={-(-batch // accumulate) * accumulate}."
        )
    if num_devices is None:
        return
    shape = mesh_lib.resolve(config.mesh, num_devices)
    rows = 1
    for axis in mesh_lib.BATCH_AXES:
        rows *= shape[axis]
    if batch // accumulate % rows:
        per_step = rows * accumulate
        raise ValueError(
            f"data.batch_size={batch} cannot be split over {rows} devices on mesh axes "
            f"({', '.join(mesh_lib.BATCH_AXES)}) with train.accumulate={accumulate}; use a multiple "
            f"of {per_step}, for example {-(-batch // per_step) * per_step}."
        )
    if config.data.seq_len % shape["context"]:
        raise ValueError(
            f"data.seq_len={config.data.seq_len} cannot be split over mesh.context="
            f"{shape['context']}; use a multiple of it."
        )
