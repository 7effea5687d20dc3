"""Factors of initial parameters by public path: `layers/*/ffn/up/kernel 0.5`.

A pattern and a number a line (`*` within one level, `**` over any number of levels); where several
match, the last one counts. effarch/scaling/mup.py makes such rules.
"""

from collections.abc import Sequence

import jax
import numpy as np
from flax import nnx

from effarch import names
from effarch.models import parameters


def apply(model: nnx.Module, rules: Sequence[str]) -> None:
    """Multiplies the parameters of a fresh model. Raises ValueError for a rule that does not fit."""
    if not rules:
        return
    parsed = [_parse(text, index) for index, text in enumerate(rules)]
    used: set[int] = set()
    state = nnx.state(model, nnx.Param)
    is_variable = dict(is_leaf=lambda node: isinstance(node, nnx.Variable))
    for key_path, variable in jax.tree_util.tree_leaves_with_path(state, **is_variable):
        public = parameters.public_paths(parameters.path_of(key_path))
        factors = np.ones(len(public), np.float32)
        for index, (pattern, factor) in enumerate(parsed):
            matched = [bool(pattern.fullmatch(path)) for path in public]
            factors = np.where(matched, factor, factors).astype(np.float32)
            used |= {index} if any(matched) else set()
        if (factors != 1).any():
            value = variable.get_value()
            stacked = factors.reshape(-1, *[1] * (value.ndim - 1))
            whole = factors[0] if len(public) == 1 else stacked
            variable.set_value(value * whole.astype(value.dtype))
    for index, text in enumerate(rules):
        if index not in used:
            raise ValueError(f"model.init_rules[{index}]: {text!r} matches no parameter.")
    nnx.update(model, state)


def _parse(text: str, index: int):
    pattern, _, number = text.partition(" ")
    try:
        factor = float(number)
    except ValueError:
        factor = -1.0
    if not 0 <= factor < float("inf"):
        raise ValueError(
            f"model.init_rules[{index}]: {text!r} must be a path pattern and a number of at least 0, "
            "such as 'layers/*/ffn/** 0.5'."
        )
    return names.glob(pattern), factor
