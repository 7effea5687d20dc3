"""Parametrizations under which the best learning rate of a small model serves a large one.

muP, arXiv 2203.03466; depth-muP, arXiv 2310.02244; CompleteP, arXiv 2505.01618. A model is compared with
the base model that was tuned, matrix by matrix: with m = inputs / inputs there, M = depth / depth there
and a = 1 (CompleteP) or 1/2 (depth-muP):

    matrices of layers    initial values / sqrt(m), learning rate / m, weight decay * m
    inside layers         what is added to the stream * M^-a; learning rate * M^(a - 1)
    logits                / (width / width there); the table and the head keep their learning rate
    attention             scores q k sqrt(K there) / K in place of q k / sqrt(K), where not normed
    Adam's epsilon        / (width / width there) * M^-a

muP has no factors of depth. A matrix whose inputs do not grow (a low-rank gate's) keeps its values; one
whose start does not come from `init_std` is taken to shrink with its inputs by itself. Low-rank factors
share what a whole matrix shrinks by: m^(-1/4) each, m of that matrix. At the base's own size nothing
changes. Everything is expressed as config fields: `optimizer.rules`, `model.init_rules`,
scales. Keep the width of heads, the batch, the steps and the schedule as they are: recurrent mixers keep
their scale K^-0.5.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from ml_collections import ConfigDict

from effarch import config as config_lib
from effarch import names
from effarch.models import build, layer_language, parameters
from effarch.models.layers import adapter, structures

KINDS = {"mup": None, "depth_mup": 0.5, "completep": 1.0}
"""The exponent a; None leaves depth alone."""
_VOCAB = 512
_EPSILONS = ("eps", "adam_eps")


def parametrize(config: ConfigDict, base: ConfigDict, *, kind: str = "completep") -> dict[str, Any]:
    """The overrides that give `config` the parametrization `kind`, field by field.

    `base` is the tuned config; the two differ in sizes alone. Use with
    `config.update_from_flattened_dict`, or in a `get_sweep`. Raises ValueError if a layer of `config` is
    of a kind that `base` has not.
    """
    exponent = names.lookup(KINDS, kind, "parametrization")
    width, depth = (config.model[n] / base.model[n] for n in ("width", "depth"))
    depth = 1.0 if exponent is None else depth
    exponent = 1.0 if exponent is None else exponent
    lines = _lines(config.model, base.model, depth ** (exponent - 1))
    optimizer = config.optimizer.kind
    found = {
        "model.init_rules": (*(text for text, _ in lines if text), *config.model.init_rules),
        "optimizer.rules": (*(text for _, text in lines if text), *config.optimizer.rules),
        "model.residual_scale": config.model.residual_scale * depth**-exponent,
        "model.logit_scale": config.model.logit_scale / width,
    }
    for name in _EPSILONS:
        if name in config.optimizer[optimizer]:
            epsilon = config.optimizer[optimizer][name] / width * depth**-exponent
            found[f"optimizer.{optimizer}.{name}"] = epsilon
    return found | _scales(config.model, base.model)


def apply(config: ConfigDict, base: ConfigDict, *, kind: str = "completep") -> None:
    """`parametrize`, put into `config`."""
    config.update_from_flattened_dict(parametrize(config, base, kind=kind))


def _lines(model: ConfigDict, base: ConfigDict, depth_lr: float) -> list[tuple[str, str]]:
    """(init rule, optimizer rule) of the parameters of layers; "" where there is nothing to say."""
    factors: dict[str, dict[int, tuple[float, float]]] = {}
    here = _inputs(model)
    there = {(block, path): inputs for (block, _, path), inputs in _inputs(base).items()}
    own_starts = _own_starts(config_lib.to_json(base))
    for (block, number, path), inputs in here.items():
        if (block, path) not in there:
            raise ValueError(
                f"parametrization: layer {number} ({block}) has {path}, and no layer of the base config "
                "has; give a base that differs in sizes alone."
            )
        growth = inputs / there[block, path]
        init = 1.0 if (block, path) in own_starts else growth**-0.5
        if init != 1 and "/structure/" in path:
            first = f"{path.rpartition('/')[0]}/down"
            init = (here[block, number, first] / there[block, first]) ** -0.25
        factors.setdefault(path, {})[number] = (growth, init)
    lines = []
    for path, by_layer in factors.items():
        if len(set(by_layer.values())) == 1:
            by_layer = {"*": next(iter(by_layer.values()))}
        for number, (growth, init) in by_layer.items():
            public, lr = f"layers/{number}/{path}", depth_lr / growth
            decay = f" decay={growth:.9g}" if growth != 1 else ""
            lines.append(
                (
                    f"{public} {init:.9g}" if init != 1 else "",
                    f"{public} lr={lr:.9g}{decay}" if lr != 1 or decay else "",
                )
            )
    return lines


def _inputs(model: ConfigDict) -> dict[tuple[str, int, str], int]:
    """Inputs of each matrix of the layers by (block, layer, path in the block); 1 for other arrays.

    The entries of a sparse matrix have those of the factors beside them.
    """
    built = build.abstract(_plain(model), vocab_size=_VOCAB)
    layers = {
        f"layers/{name}/{path}": layer
        for name, block in built.layers.items()
        for path, layer in adapter.linear_layers(block).items()
    }
    turned = {f"{path}/kernel" for path, layer in layers.items() if layer.by_outputs}
    # Second factors whose product is divided by their inputs, the rank, as it is.
    divided = {f"{path}/adapter/up/kernel" for path in layers} | {
        f"{path}/structure/up"
        for path, layer in layers.items()
        if isinstance(layer.structure, structures.SlTrain)
    }
    infos = jax.tree.leaves(parameters.describe(nnx.state(built, nnx.Param)))
    shapes = {}
    for info in infos:
        shape = [n for n, axis in zip(info.shape, info.logical) if axis not in parameters.STACKING]
        shapes[info.path] = shape[::-1] if info.path in turned else shape
    found = {}
    for info in infos:
        is_sparse = "sparse" in info.logical
        shape = shapes[f"{info.path.rpartition('/')[0]}/down" if is_sparse else info.path]
        is_matrix = len(shape) == 2 and "conv" not in info.logical and info.path not in divided
        found |= dict.fromkeys(_keys(model, info), shape[0] if is_matrix else 1)
    return found


@functools.cache
def _own_starts(base: str) -> set[tuple[str, str]]:
    """(block, path) of the parameters of layers whose start does not come from `init_std`."""
    model = _plain(config_lib.from_json(base))
    model.init_std = 0.0

    def start():
        built = build.model(model, vocab_size=_VOCAB, rngs=nnx.Rngs(0))
        return jax.tree.map(jnp.any, nnx.to_pure_dict(nnx.state(built, nnx.Param)))

    infos = parameters.describe(nnx.state(build.abstract(model, vocab_size=_VOCAB), nnx.Param))
    return {
        (block, path)
        for info, is_own in zip(jax.tree.leaves(infos), jax.tree.leaves(jax.jit(start)()))
        if is_own
        for block, _, path in _keys(model, info)
    }


def _keys(model: ConfigDict, info: parameters.ParamInfo) -> list[tuple[str, int, str]]:
    """(block, layer, path in the block) of a stacked array, a layer each; none outside of layers."""
    blocks = [str(layer) for layer in layer_language.layers(model.layers, model.depth)]
    split = [public.split("/", 2) for public in info.public_paths if public.startswith("layers/")]
    return [(blocks[int(number)], int(number), path) for _, number, path in split]


def _plain(model: ConfigDict) -> ConfigDict:
    """A copy without rules for the start."""
    plain = config_lib.from_json(config_lib.to_json(model))
    plain.init_rules = ()
    return plain


def _scales(model: ConfigDict, base: ConfigDict) -> dict[str, float]:
    """`scale` of attention whose heads are wider than the base's."""
    found = {}
    for name, section in model.blocks.items():
        if section.kind == "attention" and name in base.blocks and not section.qk_norm:
            here, there = _head_dim(section, model.width), _head_dim(base.blocks[name], base.width)
            if here != there:
                found[f"model.blocks.{name}.scale"] = math.sqrt(there) / here
    return found


def _head_dim(section: ConfigDict, width: int) -> int:
    return section.head_dim or width // section.num_heads
