"""Optimizers by name. To add one: a file here with its constructor, and a line in KINDS.

A constructor takes a schedule and keyword-only arguments; those but `groups` are its config fields.
"""

import inspect
from collections.abc import Sequence
from typing import Any

import optax

from effarch import names
from effarch.training.optimizers import (
    adam8bit,
    adamw,
    coat,
    dct_adamw,
    galore,
    groups,
    muon,
    trion,
    updates,
)

KINDS = {
    "adam8bit": adam8bit.adam8bit,
    "adamw": adamw.adamw,
    "coat": coat.coat,
    "dct_adamw": dct_adamw.dct_adamw,
    "galore": galore.galore,
    "muon": muon.muon,
    "trion": trion.trion,
}


def build(
    kind: str,
    *,
    schedule: optax.ScalarOrSchedule,
    clip_norm: float,
    infos: Any,
    rules: Sequence[str] = (),
    **given,
) -> optax.GradientTransformation:
    """The optimizer named `kind` for the parameters described by `infos`.

    Args:
      schedule: the learning rate of update s, counted from 0, or one number.
      clip_norm: largest global norm of the gradients of what is not frozen; 0 does not clip.
      infos: a nested dict of ParamInfo in the shape of the parameters.
      rules: lines such as "embed/** lr=2 decay=0"; see `groups`.
      given: keyword arguments of the optimizer; `options(kind)` lists them with defaults.
    """
    names.refuse_unknown(given, options(kind), f"optimizer.{kind}")
    updates.check_range("clip_norm", clip_norm, 0)
    assigned = groups.assign(infos, rules)
    optimizer = KINDS[kind](schedule, groups=assigned, **given)
    if clip_norm == 0:
        return optimizer
    clip = optax.clip_by_global_norm(clip_norm)
    return optax.chain(updates.drop_frozen_gradients(assigned), clip, optimizer)


def options(kind: str) -> dict:
    """The config fields of the optimizer named `kind` and their defaults."""
    fields = inspect.signature(names.lookup(KINDS, kind, "optimizer.kind")).parameters
    return {
        name: field.default
        for name, field in fields.items()
        if field.kind is field.KEYWORD_ONLY and name != "groups"
    }
