"""The layers of a model with plain experts as MoLE layers: config section and arrays.

Legend: R = repeats of a stack, G = groups.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from effarch import config as config_lib
from effarch.convert.moe_to_latent import calibration, factors
from effarch.models import layer_language, parameters
from effarch.models.ffns import mole


@dataclasses.dataclass(frozen=True)
class Options:
    """`group_size`, `latent`, `factor` and `tie_in` as in mole; `rank_reduce` (0: off) first brings each
    expert to a rank of its own (the paper's first phase); `calibrate` is in tokens, 0 fits weights."""

    group_size: int = 8
    latent: int = 0
    factor: str = mole.FACTORS[0]
    tie_in: bool = False
    rank_reduce: int = 0
    calibrate: int = 0


def parse(text: str) -> Options:
    """`group_size=4,latent=64`. Raises ValueError for a name that is no option."""
    defaults = dataclasses.asdict(Options()) | {"tie_in": 0}
    values = config_lib.parse_arg(text, **defaults)
    return Options(**values | {"tie_in": bool(values["tie_in"])})


def latent_model(model: ConfigDict, options: Options) -> ConfigDict:
    """`config.model` with a mole section for each section of plain experts. Raises ValueError."""
    m = config_lib.from_json(config_lib.to_json(model))
    used = {layer.ffn for layer in layer_language.layers(m.layers, m.depth)} - {"none"}
    found = [name for name in sorted(used) if m.blocks[name].kind == "moe"]
    if not found:
        raise ValueError(
            f"model.layers={m.layers!r} has no layer of kind moe; there is nothing to convert."
        )
    for name in found:
        own = m.blocks[name]
        section = config_lib.default().model.blocks.mole
        section.update({field: own[field] for field in own if field != "kind"})
        section.update(group_size=options.group_size, factor=options.factor)
        section.tie_in = options.tie_in
        section.exchange = "all_to_all" if own.exchange == "ring" else own.exchange
        section.latent = options.latent or own.hidden or m.width
        new = name.replace("moe", "mole") if "moe" in name else f"{name}_mole"
        m.blocks[new] = section
        m.layers = re.sub(rf"/\s*{name}\b", f"/{new}", m.layers)
    return m


def arrays(
    model, options: Options, moments: Mapping[int, np.ndarray] | None
) -> tuple[dict[str, np.ndarray], list[dict[str, Any]]]:
    """Parameters of the converted layers by path, and what was lost, a row a layer and matrix.

    `moments`: E[x x^T] by layer, or None. A row has `layer`, `matrix`, `weights_lost` (|W - W'|^2 /
    |W|^2) and, with moments, `outputs_lost` (of x W) and `outputs_lost_plain`, that of a fit to the
    weights.
    """
    found: dict[str, np.ndarray] = {}
    rows: list[dict[str, Any]] = []
    for stack, block in model.layers.items():
        if not calibration.is_convertible(block.ffn):
            continue
        weights = nnx.to_pure_dict(nnx.state(block.ffn.experts, nnx.Param))
        parts: dict[str, list[np.ndarray]] = {}
        for index, layer in enumerate(parameters.stack_layers(stack)):
            own = {name: np.asarray(weights[name][index]) for name in ("gate", "up", "down")}
            new, lost = _layer(own, options, None if moments is None else moments[layer])
            for name, array in new.items():
                parts.setdefault(name, []).append(array)
            rows += [{"layer": layer, **row} for row in lost]
        found |= {f"layers/{stack}/ffn/experts/{name}": np.stack(x) for name, x in parts.items()}
    return found, rows


def _layer(weights: Mapping[str, np.ndarray], options: Options, moment_DD):
    """The arrays of one MoLE layer and a row for each matrix."""
    new, rows = {"down": weights["down"]}, []
    rank = options.latent or weights["gate"].shape[2]
    separate = {"latent_gate": ("gate",), "latent_up": ("up",)}
    for shared, names in ({"latent_in": ("gate", "up")} if options.tie_in else separate).items():
        w_GKDF = np.concatenate([_grouped(weights[name], options) for name in names], axis=1)
        b_GDL, a_GKLF = _fit(w_GKDF, rank, options, moment_DD)
        plain = None if moment_DD is None else _fit(w_GKDF, rank, options, None)
        new[shared] = b_GDL
        for number, name in enumerate(names):
            own = slice(number * options.group_size, (number + 1) * options.group_size)
            true, approximate = w_GKDF[:, own], b_GDL[:, None] @ a_GKLF[:, own]
            new[name] = a_GKLF[:, own].reshape(-1, *a_GKLF.shape[2:])
            row = {"matrix": name, "weights_lost": factors.weights_lost(true, approximate)}
            if plain is not None:
                by_weights = plain[0][:, None] @ plain[1][:, own]
                row["outputs_lost"] = factors.outputs_lost(true, approximate, moment_DD)
                row["outputs_lost_plain"] = factors.outputs_lost(true, by_weights, moment_DD)
            rows.append(row)
    if options.factor == "all":
        w_GKFD = _grouped(weights["down"], options)
        pairs = [factors.shared_out(_kept(group, options), rank) for group in w_GKFD]
        a_GKFL, b_GLD = (np.stack(part) for part in zip(*pairs))
        lost = factors.weights_lost(w_GKFD, a_GKFL @ b_GLD[:, None])
        rows.append({"matrix": "down", "weights_lost": lost})
        new |= {"down": a_GKFL.reshape(-1, *a_GKFL.shape[2:]), "latent_out": b_GLD}
    return new, rows


def _fit(w_GKDF, rank: int, options: Options, moment_DD):
    """B [G,D,L] and A [G,K,L,F]."""
    pairs = [factors.shared_in(_kept(group, options), rank, moment_DD) for group in w_GKDF]
    return tuple(np.stack(part) for part in zip(*pairs))


def _grouped(w_E, options: Options):
    return w_E.reshape(-1, options.group_size, *w_E.shape[1:])


def _kept(w_K, options: Options):
    """The matrices that are factored."""
    return factors.reduced(w_K, options.rank_reduce) if options.rank_reduce else w_K
