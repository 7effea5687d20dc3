"""The default config, and what every config passes through: parse, check, freeze, fingerprint.

A config file has `get_config(arg="")` that starts from `default()` and changes fields. `python -m
effarch.train --config=FILE --config.some.field=value` overrides them. `finish` then checks the whole.
A new field's default computes what was computed before there was one: older runs stay as they are.
"""

import functools
import hashlib
import json
from typing import Any

from ml_collections import ConfigDict, FrozenConfigDict, config_dict

from effarch import names
from effarch.data import tasks
from effarch.models import ffns, layer_language, mixers, registry
from effarch.quantization import recipes, rules
from effarch.training import optimizers

IDENTITY_FREE = ("mesh", "hosts", "log", "checkpoint")
"""Sections that do not change what is computed, and so are not part of the fingerprint."""


def default() -> ConfigDict:
    """A small transformer on the Python standard library; every field with its meaning."""
    c = ConfigDict()
    c.name = "run"  # names the run folder
    c.seed = 0  # initial parameters, data order and everything else random

    c.data = ConfigDict()
    c.data.sources = ("embedded:stdlib",)  # embedded:NAME, files:GLOB; several make a mixture
    c.data.weights = ()  # share of tokens of each source; () is in proportion to their sizes
    c.data.tokenizer = "bpe:4096"  # bytes, bpe:SIZE, file:PATH
    c.data.val_permille = 50  # documents in a thousand that are held out, by hash of their text
    c.data.path = ""  # a folder made by effarch.prepare_data; then the three above are unused
    c.data.cache_dir = ""  # where prepared sources are kept; "" is ~/.cache/effarch
    c.data.seq_len = 256  # tokens a row
    c.data.batch_size = 16  # rows a step, over all devices

    c.data.task = _default_task()

    c.model = _default_model()
    c.quantization = _default_quantization()
    c.optimizer = _default_optimizer()

    c.train = ConfigDict()
    c.train.num_steps = 1000
    c.train.accumulate = 1  # micro-batches a step
    c.train.spike_factor = (
        0.0  # skip updates whose gradient norm is this often the usual one; 0 off
    )
    c.train.max_bad_steps = 10  # give up after so many skipped updates in a row (NaN or spike)

    c.eval = ConfigDict()
    c.eval.every_steps = 250  # 0: only at the end
    c.eval.max_batches = 0  # batches of an evaluation in the loop, 0 is all; the last one takes all

    c.checkpoint = ConfigDict()
    c.checkpoint.every_steps = 250  # 0: only at the end
    c.checkpoint.keep = 2  # newest checkpoints kept
    c.checkpoint.keep_period = 0  # checkpoints at multiples of this stay for good; 0 off

    c.mesh = ConfigDict()  # devices along each axis; -1 takes what is left
    c.mesh.data = 1  # replicas of the parameters
    c.mesh.fsdp = -1  # pieces of the parameters, gathered when used
    c.mesh.expert = 1  # pieces of the experts
    c.mesh.context = 1  # pieces of the sequence
    c.mesh.tensor = 1  # pieces of heads and channels
    c.mesh.rules = ()  # "stream=context": changes to the table of effarch/parallel/sharding.py

    c.hosts = ConfigDict()
    c.hosts.timeout_seconds = 300.0  # a process silent or stuck for so long ends the run; 0 off

    c.log = ConfigDict()
    c.log.every_steps = 10  # steps between lines of metrics.jsonl
    c.log.tensorboard = True
    c.log.sample_prompts = ("def ", "import ", "The ")  # continued at the end of the run
    c.log.sample_tokens = 128
    return c


def _default_task() -> ConfigDict:
    t = ConfigDict()
    t.name = "none"  # a synthetic task instead of text, see effarch/data/tasks; none: text
    t.num_examples = 0  # distinct training examples; 0: new ones every step
    t.num_validation = 1024  # examples that are scored
    for kind, constructor in tasks.KINDS.items():
        t[kind] = registry.section(constructor)
    return t


def _default_model() -> ConfigDict:
    m = ConfigDict()
    m.width = 256  # channels of the residual stream
    m.depth = 8  # number of layers
    m.layers = "attention/glu"  # which block at which layer: effarch/models/layer_language.py
    m.vocab_size = 0  # 0 takes the tokenizer's size
    m.tied_head = True  # the output matrix is the transposed token table
    m.norm = ConfigDict()
    m.norm.placement = "pre"  # pre, post or peri
    m.norm.embed = False  # also after the embedding
    m.norm.eps = 1e-6
    m.embed_scale = 1.0  # the token table is multiplied by it on its way into the stream
    m.residual_scale = 1.0  # what a mixer or ffn adds to the stream is multiplied by it
    m.logit_scale = 1.0  # logits are multiplied by it, before the soft cap
    m.logit_softcap = config_dict.placeholder(float)  # c: logits become c tanh(logits / c)
    m.z_loss = 0.0  # weight of logsumexp(logits)^2 in the loss
    m.init_std = 0.02  # standard deviation of initial weights
    m.init_rules = ()  # "layers/*/ffn/** 0.5": factors of initial parameters by public path
    m.lora = ConfigDict()  # low-rank adapters of linear layers; all else is frozen
    m.lora.rank = 0  # 0: none
    m.lora.alpha = 16.0  # their product is multiplied by alpha / rank
    m.lora.paths = ("layers/**",)  # the linear layers that get one
    m.structured = ConfigDict()  # linear layers kept as factors
    m.structured.form = "none"  # low_rank, block_dense, block_shuffle, sltrain
    m.structured.rank = 0  # of low_rank, block_dense and sltrain
    m.structured.blocks = 4  # of block_dense and block_shuffle
    m.structured.density = 0.03  # sltrain: entries of the sparse part over those of the matrix
    m.structured.scale = 16.0  # sltrain: the low-rank part is multiplied by scale / rank
    m.structured.guided_steps = 0  # over which a dense matrix beside them fades out; 0: none
    m.structured.reduce_flops = True  # and used at random, less and less often
    m.structured.paths = ("layers/*/ffn/**",)  # the linear layers that are kept so
    m.dtype = "auto"  # activations: float32, bfloat16; auto: bfloat16 except on CPUs
    m.param_dtype = "float32"  # master weights
    m.scan = "auto"  # equal periods of layers as a loop: always, never; auto: except on CPUs
    m.remat = "none"  # kept for the backward pass: none (all), dots, selective, full, names:...
    m.blocks = ConfigDict()  # the sections that model.layers names; their options: the constructors
    for kind in (*mixers.KINDS, *ffns.KINDS):
        m.blocks[kind] = block(kind)
    return m


def _default_quantization() -> ConfigDict:
    q = ConfigDict()
    q.recipe = "none"  # of all linear layers of the blocks: none, fp8_current, quartet, ...
    q.rules = ()  # "layers/*/ffn/** mxfp8": recipes by public path, see quantization/rules.py
    q.keep = rules.KEEP  # paths that stay unrounded whatever the rules say
    q.keep_first = 0  # so many first layers stay unrounded
    q.keep_last = 0  # and so many last ones
    q.start_step = 0  # steps trained without rounding at the start
    q.tail_steps = 0  # and at the end
    q.anneal_steps = 0  # last steps in which, with ofq, only weights near a threshold move (CGA)
    q.anneal_reach = 0.005  # how near, in steps between levels
    q.saved_group = 0  # above 0: norms and activations keep FP8 copies in such groups (COAT: 16)
    q.metrics_every = 0  # steps between looks at what rounding does to each layer; 0: none
    q.native = False  # multiply float8, int8 and FP4 numbers as they are; False: rounded values
    for kind in recipes.KINDS:
        if kind != "none":
            q[kind] = ConfigDict(recipes.options(kind))
    return q


def _default_optimizer() -> ConfigDict:
    o = ConfigDict()
    o.kind = "adamw"  # adamw, muon, coat, adam8bit, dct_adamw, trion, galore
    o.learning_rate = 1e-3  # peak
    o.schedule = ConfigDict()
    o.schedule.kind = "cosine"  # cosine, wsd, constant
    o.schedule.warmup_steps = 100
    o.schedule.final_fraction = 0.1  # last learning rate / peak; cosine and wsd
    o.schedule.decay_fraction = 0.2  # wsd: part of the steps spent decaying
    o.schedule.decay_shape = "1-sqrt"  # wsd: linear, 1-sqrt, cosine
    o.clip_norm = 1.0  # largest gradient norm; 0 off
    o.rules = ()  # "layers/*/mixer/rate/* lr=0.1 decay=0": settings by public path
    for kind in optimizers.KINDS:
        o[kind] = ConfigDict(optimizers.options(kind))
    return o


def block(kind: str, **options) -> ConfigDict:
    """A section for `config.model.blocks`: a mixer or ffn of a kind, with some options set.

    `c.model.blocks.local = config.block("attention", window=512)` makes `local/glu` a block.
    """
    constructor = names.lookup({**mixers.KINDS, **ffns.KINDS}, kind, "model.blocks kind")
    section = registry.section(constructor)
    names.refuse_unknown(options, section, kind)
    section.update(options)
    section.kind = kind
    return section


def parse_arg(arg: str | None, **defaults):
    """`"size=tiny,seq=512"` -> the defaults with those values, each in its default's type."""
    values = dict(defaults)
    for part in filter(None, (arg or "").split(",")):
        name, equals, text = part.partition("=")
        if not equals or name not in defaults:
            raise ValueError(
                f"config argument {part!r} is not known. {names.did_you_mean(name, defaults)}"
            )
        try:
            values[name] = type(defaults[name])(text)
        except ValueError:
            kind = type(defaults[name]).__name__
            raise ValueError(
                f"config argument {part!r}: expected a value of type {kind}."
            ) from None
    return values


def to_json(config) -> str:
    """Canonical text: sorted keys, tuples as lists."""
    return json.dumps(_plain(config), sort_keys=True, indent=1)


def from_json(text: str) -> ConfigDict:
    """The config that `to_json` wrote; every list becomes a tuple again."""
    return ConfigDict(_with_tuples(json.loads(text)))


def completed(config: ConfigDict) -> ConfigDict:
    """A config of an older version with the fields that came since, at their defaults."""
    fields = _plain(config)
    return ConfigDict(_with_tuples(_with_missing(fields, _defaults(fields))))


def _defaults(fields: dict) -> dict:
    """The fields of the default config, with the blocks of `fields` at the defaults of their kinds."""
    found, kinds = _default_fields(), {**mixers.KINDS, **ffns.KINDS}
    blocks = dict(found["model"]["blocks"])
    for name, section in fields.get("model", {}).get("blocks", {}).items():
        kind = section.get("kind") if isinstance(section, dict) else None
        blocks[name] = _block_fields(kind) if kind in kinds else {}
    return found | {"model": found["model"] | {"blocks": blocks}}


@functools.cache
def _default_fields() -> dict:
    return _plain(default())


@functools.cache
def _block_fields(kind: str) -> dict:
    return _plain(block(kind))


def _with_missing(fields: dict, known: dict) -> dict:
    """The fields, and those of `known` that they lack."""
    both = {
        name: _with_missing(fields[name], value)
        for name, value in known.items()
        if isinstance(value, dict) and isinstance(fields.get(name), dict)
    }
    return known | fields | both


def fingerprint(config) -> str:
    """16 hexadecimal digits of the fields that decide what a run computes.

    A field at its default does not count, but for kinds: a version that adds one knows earlier runs.
    """
    fields = _plain(config)
    text = json.dumps(_without(_identity(fields), _defaults(fields)), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def freeze(config: ConfigDict) -> FrozenConfigDict:
    """A config with references resolved, lists as tuples, that nobody can change."""
    return FrozenConfigDict(_with_tuples(_plain(config)))


def _identity(config) -> dict:
    """The fields that count: no section that does not change the run, no options of kinds not in use."""
    fields = {name: part for name, part in _plain(config).items() if name not in IDENTITY_FREE}
    model, optimizer = fields["model"], fields["optimizer"]
    layers = layer_language.layers(model["layers"], model["depth"])
    used = {name for layer in layers for name in (layer.mixer, layer.ffn)}
    model["blocks"] = {name: part for name, part in model["blocks"].items() if name in used}
    if not model.get("lora", {}).get("rank"):
        model.pop("lora", None)
    if model.get("structured", {}).get("form", "none") == "none":
        model.pop("structured", None)
    fields["quantization"].pop("metrics_every", None)  # a look at the run, no part of it
    for kind in set(optimizers.KINDS) - {optimizer["kind"]}:
        optimizer.pop(kind, None)
    task = fields["data"].pop("task", {"name": "none"})
    if task["name"] != "none":
        kept = set(task) - (set(tasks.KINDS) - {task["name"]})
        fields["data"]["task"] = {name: task[name] for name in task if name in kept}
    return fields


def _without(fields: dict, known: dict) -> dict:
    """The fields that are not as in `known`, and those named kind."""
    found = {}
    for name, value in fields.items():
        if isinstance(value, dict):
            if rest := _without(value, known.get(name, {})):
                found[name] = rest
        elif name == "kind" or name not in known or value != known[name]:
            found[name] = value
    return found


def _plain(config):
    """A copy of dicts and lists."""
    if isinstance(config, ConfigDict) and not isinstance(config, FrozenConfigDict):
        config = config.copy_and_resolve_references()
    if isinstance(config, ConfigDict | dict):
        return {name: _plain(config[name]) for name in config}
    if isinstance(config, tuple | list):
        return [_plain(item) for item in config]
    return config


def _with_tuples(value):
    if isinstance(value, dict):
        return {name: _with_tuples(item) for name, item in value.items()}
    if isinstance(value, tuple | list):
        return tuple(_with_tuples(item) for item in value)
    return value


def differences(first, second) -> list[tuple[str, Any, Any]]:
    """(field, first's value, second's value) where two configs would not compute the same."""
    flat = [_flatten(_identity(config)) for config in (first, second)]
    fields = sorted(set(flat[0]) | set(flat[1]))
    return [
        (name, flat[0].get(name), flat[1].get(name))
        for name in fields
        if flat[0].get(name) != flat[1].get(name)
    ]


def _flatten(tree: dict, prefix: str = "") -> dict[str, Any]:
    flat = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat
