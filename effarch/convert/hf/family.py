"""What a family of published models is: its config.json and its tensors, read in both directions.

`fields` says which field of config.json is which field of `config.model`; `read` and `write` do what a
table cannot say. Whether a model of ours can be written as a family is not listed anywhere: it is
written, read back and compared.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from effarch import config as config_lib
from effarch.convert.hf import mapping, positions
from effarch.models import layer_language
from effarch.models.ffns import glu

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "sigmoid": "sigmoid",
}
"""Their names and ours; of several the first is written."""

TRAINING_ONLY = {
    "dtype", "init_std", "lora", "param_dtype", "remat", "scan", "z_loss",
    "backend", "balance_coef", "balance_scaling", "balance_scope", "bias_rate", "bias_stop_step",
    "bias_zero_mean", "capacity_factor", "chunk_size", "exchange", "top1_coef", "top1_temperature",
    "z_coef",
}  # fmt: skip
"""Options of a model and its blocks that do not change what a trained model computes."""


class Inexpressible(ValueError):
    """A family has no field for something that a model has; `fields` names all of it."""

    def __init__(self, family: str, fields: list[str]):
        super().__init__(f"{family} models have no {', '.join(fields[:3])}")
        self.fields = fields


def _nothing(*_) -> None:
    pass


@dataclasses.dataclass(frozen=True)
class Family:
    """One architecture. `hf` is the content of config.json, `m` is `config.model`."""

    model_type: str
    architecture: str
    """The class that loads it."""
    fields: Mapping[str, str]
    defaults: Mapping[str, Any]
    """Fields that config.json may leave out."""
    fixed: Mapping[str, Any]
    """Fields of which one value is supported; it is also the default."""
    layers: Callable[[dict], list[str]]
    """hf -> the block of each layer, such as "attention/glu"."""
    tensors: Callable[[ConfigDict], list[mapping.Rule]]
    read: Callable[[dict, ConfigDict], None] = _nothing
    write: Callable[[ConfigDict, dict], None] = _nothing
    ignored: tuple[str, ...] = ()
    """Regular expressions of tensors that are no part of the model; DEPTH is the number of layers."""


def read_config(family: Family, content: dict) -> ConfigDict:
    """`config.model` of a config.json. Raises ValueError for what effarch has no layer for."""
    hf = {**family.fixed, **family.defaults, **positions.flat(content)}
    for name, value in family.fixed.items():
        if hf[name] != value:
            raise ValueError(
                f"config.json: {name}={hf[name]!r} is not supported for {family.model_type}; only "
                f"{value!r} is."
            )
    positions.refuse(hf, family.fields, family.model_type)
    m = config_lib.default().model
    for theirs, ours in {"vocab_size": "vocab_size", **family.fields}.items():
        try:
            _set(m, ours, _required(hf, theirs))
        except TypeError:
            raise ValueError(
                f"config.json: {theirs}={hf[theirs]!r} is of the wrong type; check the file."
            ) from None
    m.layers = layer_text(family.layers(hf))
    family.read(hf, m)
    return m


def write_config(family: Family, model: ConfigDict) -> dict:
    """config.json of `config.model`. Raises Inexpressible if the family cannot say what it is."""
    m = canonical(model)
    hf = {"architectures": [family.architecture], "model_type": family.model_type, **family.fixed}
    for theirs, ours in {"vocab_size": "vocab_size", **family.fields}.items():
        hf[theirs] = _get(m, ours)
    family.write(m, hf)
    found = _differences(m, canonical(read_config(family, hf)))
    if found:
        raise Inexpressible(family.model_type, found)
    positions.write(hf)
    return hf


def layer_text(blocks: Sequence[str]) -> str:
    """The shortest `model.layers` that lays these blocks."""
    for size in range(1, len(blocks) + 1):
        for first in range(size):
            period = size - first
            rest = range(first + period, len(blocks))
            if all(blocks[layer] == blocks[layer - period] for layer in rest):
                repeat = _sum(blocks[first:size])
                return f"first: {_sum(blocks[:first])}; repeat: {repeat}" if first else repeat
    raise ValueError("config.json: num_hidden_layers=0 leaves nothing to convert.")


def blocks_of(m: ConfigDict) -> list[str]:
    """The block of each layer, such as "attention/glu"."""
    return [str(layer) for layer in layer_language.layers(m.layers, m.depth)]


def canonical(model: ConfigDict) -> ConfigDict:
    """The same model with its sections named by their kind and every optional size written out.

    Attention with a window is called `local`. Raises ValueError if two sections of one kind differ.
    """
    m = config_lib.from_json(config_lib.to_json(model))
    found: dict[str, ConfigDict] = {}
    blocks = []
    for layer in layer_language.layers(m.layers, m.depth):
        names = []
        for section in (layer.mixer, layer.ffn):
            if section == "none":
                names.append("none")
                continue
            options = _written_out(m.blocks[section], m.width)
            name = "local" if options.get("window") else options.kind
            if found.setdefault(name, options) != options:
                raise ValueError(
                    f"model.layers has several kinds of {name}, which no published family has; "
                    "such a model cannot be exported."
                )
            names.append(name)
        blocks.append("/".join(names))
    m.layers = layer_text(blocks)
    m.blocks = config_lib.default().model.blocks
    for name, options in {**m.blocks, **found}.items():
        m.blocks[name] = _written_out(options, m.width)
    return m


def _written_out(section: ConfigDict, width: int) -> ConfigDict:
    s = ConfigDict(section.to_dict())
    missing = {
        "attention": lambda: {"num_kv_heads": s.num_heads, "head_dim": width // s.num_heads},
        "delta_net": lambda: {"num_heads": max(width // s.head_dim, 1)},
        "gated_delta_net": lambda: {"num_v_heads": s.num_heads},
        "glu": lambda: {"hidden": glu.default_hidden(width)},
        "moe": lambda: {"hidden": width},
    }.get(s.kind, dict)
    for name, value in missing().items():
        if not s[name]:
            s[name] = value
    return s


def _differences(ours: ConfigDict, back: ConfigDict) -> list[str]:
    """`field=value` of what the family did not keep."""
    used = {name for block in blocks_of(ours) for name in block.split("/")} - {"none"}
    found = []
    if blocks_of(ours) != blocks_of(back):
        found.append(f"layers={ours.layers!r}")
    flat = [_flat(m, used) for m in (ours, back)]
    found += [f"{name}={flat[0][name]!r}" for name in flat[0] if flat[0][name] != flat[1].get(name)]
    return found


def _flat(m: ConfigDict, used: set[str]) -> dict[str, Any]:
    flat = {}
    for name, value in m.items():
        if name in TRAINING_ONLY or name in ("blocks", "layers"):
            continue
        if isinstance(value, ConfigDict):
            flat |= {f"{name}.{inner}": value[inner] for inner in value}
        else:
            flat[name] = value
    for block in sorted(used & set(m.blocks)):
        options = m.blocks[block]
        flat |= {f"{block}.{name}": options[name] for name in options if name not in TRAINING_ONLY}
    return flat


def _sum(blocks: Sequence[str]) -> str:
    """Equal neighbours as a count: `3*a/b + c/d`."""
    runs: list[list] = []
    for block in blocks:
        if runs and runs[-1][0] == block:
            runs[-1][1] += 1
        else:
            runs.append([block, 1])
    return " + ".join(f"{count}*{block}" if count > 1 else block for block, count in runs)


def _required(hf: dict, name: str) -> Any:
    if name not in hf:
        raise ValueError(f"config.json has no {name}; is it the config of the whole model?")
    value = hf[name]
    if name in ("hidden_act", "hidden_activation"):
        if value not in ACTIVATIONS:
            raise ValueError(
                f"config.json: {name}={value!r} is not one of {', '.join(ACTIVATIONS)}."
            )
        return ACTIVATIONS[value]
    return value


def _set(m: ConfigDict, field: str, value: Any) -> None:
    *parents, last = field.split(".")
    for name in parents:
        m = m[name]
    m[last] = value


def _get(m: ConfigDict, field: str) -> Any:
    for name in field.split("."):
        m = m[name]
    if field.endswith(".activation"):
        names = [theirs for theirs, ours in ACTIVATIONS.items() if ours == m]
        if not names:
            raise Inexpressible("published", [f"{field}={m!r}"])
        return names[0]
    return m
