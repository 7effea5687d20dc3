"""From `config.model` to a model: the only reader of the model config."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from effarch.kernels import platform
from effarch.models import block as block_lib
from effarch.models import (
    depth_starts,
    ffns,
    init_rules,
    language_model,
    layer_adapters,
    layer_language,
    layer_recipes,
    layer_structures,
    mixers,
    parameters,
    registry,
    stack,
)
from effarch.models.layers import embedding, linear, norm

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


def model(
    config, *, vocab_size: int, rngs: nnx.Rngs, quantization=None
) -> language_model.LanguageModel:
    """The model that `config` (the `model` section) describes, with fresh parameters.

    `quantization` is the section that gives linear layers their recipes; None gives none.
    """
    dtype, param_dtype = activation_dtype(config.dtype), DTYPES[config.param_dtype]
    shared = dict(init_std=config.init_std, dtype=dtype, param_dtype=param_dtype)
    layers, runs = _stacks(config, quantization, shared, rngs)

    def make_norm():
        return norm.RMSNorm(config.width, eps=config.norm.eps, param_dtype=param_dtype)

    head = None
    if not config.tied_head:
        sizes = (config.width, vocab_size)
        head = linear.Linear(*sizes, axes=("embed", "vocab"), rngs=rngs, **shared)
    built = language_model.LanguageModel(
        embed=embedding.Embedding(
            vocab_size, config.width, scale=config.embed_scale, rngs=rngs, **shared
        ),
        layers=layers,
        runs=runs,
        embed_norm=make_norm() if config.norm.embed else None,
        final_norm=make_norm() if config.norm.placement != "post" else None,
        head=head,
        logit_scale=config.logit_scale,
        logit_softcap=config.logit_softcap,
        z_loss=config.z_loss,
        unroll=unrolled(config.scan),
        remat=config.remat,
    )
    depth_starts.apply(built, config.depth)
    init_rules.apply(built, config.init_rules)
    return built


def _stacks(config, quantization, shared: dict, rngs: nnx.Rngs):
    """The stacked blocks by name, and for each run the names that it takes in turn."""
    layers: dict[str, nnx.Module] = {}
    runs = []
    planned = layer_language.runs(config.layers, config.depth)
    makers = {layer: _block_maker(config, layer, shared) for run in planned for layer in run.period}
    recipes = layer_recipes.assign(quantization, planned, makers)
    saved_group = 0 if quantization is None else quantization.saved_group
    adapted = layer_adapters.assign(config.lora, planned, makers)
    structured = layer_structures.assign(config.structured, planned, makers)
    found = {n: (recipes[n], adapted[n], structured[n]) for n in recipes}
    for run in planned:
        keys = [jax.random.split(rngs.params(), run.repeats) for _ in run.period]
        for part in layer_recipes.parts(run, found):
            names = []
            for position, layer in enumerate(part.period):
                number = part.start + position
                make = layer_structures.with_structures(
                    makers[layer], structured[number], config.structured
                )
                make = layer_recipes.with_quantizers(make, recipes[number], saved_group)
                make = layer_adapters.with_adapters(
                    make, adapted[number], config.lora, shared["param_dtype"]
                )
                first = (part.start - run.start) // len(run.period)
                part_keys = keys[position][first : first + part.repeats]
                name = parameters.stack_name(number, len(part.period), part.repeats)
                layers[name] = stack.stacked(make, part_keys)
                names.append(name)
            runs.append(tuple(names))
    return layers, tuple(runs)


def abstract(config, *, vocab_size: int, quantization=None) -> language_model.LanguageModel:
    """The same model with shapes in place of arrays; nothing is allocated."""
    return nnx.eval_shape(
        lambda: model(config, vocab_size=vocab_size, rngs=nnx.Rngs(0), quantization=quantization)
    )


def activation_dtype(name: str):
    """`auto` is bfloat16 on accelerators and float32 on CPUs."""
    if name == "auto":
        return jnp.float32 if platform.current() == "cpu" else jnp.bfloat16
    return DTYPES[name]


def unrolled(scan: str) -> bool:
    """Whether the periods are unrolled; `auto` does so on CPUs, where it is faster."""
    return scan == "never" or (scan == "auto" and platform.current() == "cpu")


def _block_maker(config, layer: layer_language.Layer, shared) -> Callable[[nnx.Rngs], nnx.Module]:
    def make(rngs: nnx.Rngs) -> block_lib.Block:
        supplied = dict(shared, norm_eps=config.norm.eps, rngs=rngs)
        return block_lib.Block(
            config.width,
            mixer=_construct(config, mixers.KINDS, layer.mixer, supplied),
            ffn=None
            if layer.ffn == "none"
            else _construct(config, ffns.KINDS, layer.ffn, supplied),
            norm_placement=config.norm.placement,
            norm_eps=config.norm.eps,
            residual_scale=config.residual_scale,
            param_dtype=shared["param_dtype"],
        )

    return make


def _construct(config, kinds, name: str, supplied: dict):
    section = dict(config.blocks[name])
    constructor = kinds[section.pop("kind")]
    return constructor(config.width, **section, **registry.accepted(constructor, supplied))
