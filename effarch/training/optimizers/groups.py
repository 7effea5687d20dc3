"""Which parameter is updated how: its kind, learning-rate multiplier, weight decay, frozen or not.

The kind comes from the logical axes without `layers` and `experts`, never from the number of
dimensions, so that a model has the same groups whether its layers are stacked or not:

    matrix   exactly two axes, neither of them "vocab", "conv" or None: what Muon orthogonalises
    table    has a "vocab" axis: embeddings and unembeddings
    vector   everything else: norm scales, biases, short convolutions, per-head scalars

Rules change the rest, one line each: a glob over public paths (`*` within one level, `**` over any
number of levels), then settings. Later rules win, setting by setting.

    embed/** lr=2 decay=0                  twice the learning rate, no weight decay
    layers/*/mixer/q/kernel decay=4        lr and decay are multipliers, at least 0
    layers/0/** frozen=1                   never changes
    layers/*/ffn/** optimizer=adamw        matrices that Muon leaves to Adam
"""

import dataclasses
import difflib
import re
from collections.abc import Sequence
from typing import Any, Literal

import jax
import numpy as np

from effarch import names
from effarch.models import parameters

PerLayer = float | np.ndarray
"""One number, or an array [layers, 1, ...] that broadcasts over a stacked parameter."""


@dataclasses.dataclass(frozen=True)
class Group:
    """How one parameter array is updated."""

    path: str
    kind: Literal["matrix", "table", "vector"]
    lr: PerLayer = 1.0
    """Multiplies the whole step, weight decay included."""
    decay: PerLayer = 0.0
    """Multiplies the optimizer's weight decay; 0 turns it off."""
    frozen: bool | np.ndarray = False
    optimizer: str | None = None
    """`adamw` if a rule takes the parameter out of the matrix optimizer."""
    matrix_dims: tuple[int, int] | None = None
    """The two dimensions of a matrix; all others are stacked matrices. None for other kinds."""

    @property
    def is_frozen(self) -> bool:
        """Whether the whole array is frozen, so that it needs no moments."""
        return isinstance(self.frozen, bool) and self.frozen


@dataclasses.dataclass(frozen=True)
class Rule:
    """A parsed rule: a pattern over public paths and its settings."""

    text: str
    pattern: re.Pattern
    settings: dict[str, float | bool | str]


def assign(infos: Any, rules: Sequence[str] = ()) -> Any:
    """A nested dict of Group in the shape of `infos`, a nested dict of ParamInfo.

    Raises ValueError for a rule that cannot be read, that matches nothing, or that names
    another optimizer for some of the layers of one stacked matrix.
    """
    parsed = [parse_rule(text, index) for index, text in enumerate(rules)]
    public = [path for info in jax.tree.leaves(infos) for path in info.public_paths]
    for index, rule in enumerate(parsed):
        if not any(rule.pattern.fullmatch(path) for path in public):
            raise ValueError(
                f"optimizer.rules[{index}]: {rule.text!r} matches no parameter; the nearest path"
                f" is {_nearest(rule.text.split()[0], public)!r}."
            )
    return jax.tree.map(lambda info: _group(info, parsed), infos)


def kind_of(info: parameters.ParamInfo) -> Literal["matrix", "table", "vector"]:
    """`matrix`, `table` or `vector`, from the axes of one layer's (and one expert's) part."""
    axes = info.matrix_axes
    if "vocab" in axes:
        return "table"
    if len(axes) == 2 and "conv" not in axes and None not in axes:
        return "matrix"
    return "vector"


def parse_rule(text: str, index: int = 0) -> Rule:
    """`layers/*/mixer/** lr=0.1 frozen=0` as a pattern and settings."""
    field = f"optimizer.rules[{index}]"
    glob, *words = text.split() or [""]
    if not words:
        raise ValueError(
            f"{field}: {text!r} must be a path pattern followed by settings,"
            " such as 'embed/** lr=2 decay=0'."
        )
    settings = {}
    for word in words:
        name, _, value = word.partition("=")
        if name not in _SETTINGS:
            raise ValueError(
                f"{field}: {word!r} is not a setting. {names.did_you_mean(name, _SETTINGS)}"
            )
        settings[name] = _SETTINGS[name](field, name, value)
    return Rule(text, names.glob(glob), settings)


def _group(info: parameters.ParamInfo, rules: Sequence[Rule]) -> Group:
    """Applies the rules to each layer of one parameter array, then joins what is equal."""
    start = {"lr": 1.0, "decay": float(info.decay), "frozen": False, "optimizer": None}
    layers = [dict(start) for _ in info.public_paths]
    for layer, path in zip(layers, info.public_paths, strict=True):
        for rule in rules:
            if rule.pattern.fullmatch(path):
                layer.update(rule.settings)
    kind = kind_of(info)
    if kind == "matrix" and len({layer["optimizer"] for layer in layers}) > 1:
        _refuse_split(info, rules)
    dims = [dim for dim, axis in enumerate(info.logical) if axis not in parameters.STACKING]
    return Group(
        path=info.path,
        kind=kind,
        lr=_join([layer["lr"] for layer in layers], info),
        decay=_join([layer["decay"] for layer in layers], info),
        frozen=_join([layer["frozen"] for layer in layers], info),
        optimizer=layers[0]["optimizer"],
        matrix_dims=tuple(dims) if kind == "matrix" else None,
    )


def _join(values: Sequence[float | bool | str | None], info: parameters.ParamInfo) -> Any:
    """One value if all layers agree, else an array that broadcasts over the stacked parameter."""
    if len(set(values)) == 1:
        return values[0]
    return np.asarray(values).reshape(len(values), *[1] * (len(info.shape) - 1))


def _refuse_split(info: parameters.ParamInfo, rules: Sequence[Rule]) -> None:
    """Explains that the layers of one stacked matrix cannot have different optimizers."""
    index, rule, covered = next(
        (index, rule, covered)
        for index, rule in reversed(list(enumerate(rules)))
        if "optimizer" in rule.settings
        and (covered := [bool(rule.pattern.fullmatch(path)) for path in info.public_paths])
        and any(covered)
        and not all(covered)
    )
    left_out = info.public_paths[covered.index(False)]
    raise ValueError(
        f"optimizer.rules[{index}]: {rule.text!r} gives an optimizer to some layers of the stacked"
        f" array {info.path!r} and leaves out {left_out!r}; name all of its layers, or use lr=,"
        " decay= or frozen=, which work layer by layer."
    )


def _nearest(pattern: str, public: Sequence[str]) -> str:
    return difflib.get_close_matches(pattern, public, n=1, cutoff=0.0)[0]


def _factor(field: str, name: str, value: str) -> float:
    try:
        number = float(value)
    except ValueError:
        number = float("nan")
    if not 0 <= number < float("inf"):
        raise ValueError(
            f"{field}: {name}={value} must be a number of at least 0, which multiplies the"
            f" {'learning rate' if name == 'lr' else 'weight decay'}."
        )
    return number


def _switch(field: str, name: str, value: str) -> bool:
    if value not in ("0", "1"):
        raise ValueError(f"{field}: {name}={value} must be {name}=0 or {name}=1.")
    return value == "1"


def _adamw_only(field: str, name: str, value: str) -> str:
    if value != "adamw":
        raise ValueError(
            f"{field}: {name}={value} must be {name}=adamw, which takes a matrix out of the"
            " matrix optimizer."
        )
    return value


_SETTINGS = {"lr": _factor, "decay": _factor, "frozen": _switch, "optimizer": _adamw_only}
