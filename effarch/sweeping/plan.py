"""The runs of a sweep: a config file's `get_sweep()`, applied, checked and named by fingerprint."""

import copy
import dataclasses
import importlib.util
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from effarch import config as config_lib
from effarch import config_check, names
from effarch.training import trunk


@dataclasses.dataclass(frozen=True)
class Run:
    """One run of a sweep."""

    config: Any
    """Checked and frozen."""
    overrides: dict[str, Any]
    """The fields in which it differs from the sweep's base config."""
    fingerprint: str
    root: pathlib.Path
    """The sweep's folder."""
    trunk: "Run | None" = None
    """A longer run of the sweep from whose state this one's decay starts."""

    @property
    def name(self) -> str:
        return f"{self.config.name}-{self.fingerprint[:8]}"

    @property
    def folder(self) -> pathlib.Path:
        return self.root / self.name

    @property
    def config_file(self) -> pathlib.Path:
        return self.root / "configs" / f"{self.name}.json"

    @property
    def log(self) -> pathlib.Path:
        return self.root / "logs" / f"{self.name}.log"

    @property
    def failure(self) -> pathlib.Path:
        return self.root / "failures" / f"{self.name}.txt"


def get_sweep(path: str, arg: str) -> list[dict[str, Any]]:
    """What `get_sweep(arg)` of a config file, or `get_sweep()` without an arg, returns.

    Raises ValueError if there is none, or if it returns anything but a list of dicts.
    """
    spec = importlib.util.spec_from_file_location("_effarch_sweep", path)
    module = importlib.util.module_from_spec(spec) if spec else None
    if module is not None:
        spec.loader.exec_module(module)
    if not hasattr(module, "get_sweep"):
        raise ValueError(
            f"--config={path} has no get_sweep(arg); write one with effarch.sweeps, see there."
        )
    found = module.get_sweep(arg) if arg else module.get_sweep()
    try:
        return [dict(overrides) for overrides in found]
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"--config={path}: get_sweep() must return a list of dicts of overrides, as sweeps.product "
            f"does, not {found!r:.80}."
        ) from error


def runs(
    base: ConfigDict,
    sweep: Sequence[Mapping[str, Any]],
    root: pathlib.Path,
    *,
    taken: Sequence[str] = (),
) -> list[Run]:
    """The sweep's runs in its order, those of equal fingerprint once.

    `taken` are fields that the command line sets: a sweep that sets one as well is refused.
    """
    found: dict[str, Run] = {}
    for overrides in sweep:
        for field in overrides:
            if field in taken:
                raise ValueError(
                    f"--config.{field} is also set by get_sweep(); leave it to one of them."
                )
        checked = config_check.finish(apply(base, overrides))
        mark = config_lib.fingerprint(checked)
        found.setdefault(mark, Run(checked, dict(overrides), mark, root))
    if not found:
        raise ValueError("get_sweep() returned no runs; return a list of dicts of overrides.")
    return [dataclasses.replace(run, trunk=_trunk(run, found.values())) for run in found.values()]


def _trunk(run: Run, others: Iterable[Run]) -> Run | None:
    """The longest other run that passes through the start of this one's decay and keeps that state."""
    fitting = [
        other
        for other in others
        if other.config.train.num_steps > run.config.train.num_steps
        and trunk.is_trunk(other.config, run.config)
        and trunk.keeps_checkpoint(other.config, trunk.branch_step(run.config))
    ]
    return max(fitting, key=lambda other: other.config.train.num_steps, default=None)


def apply(base: ConfigDict, overrides: Mapping[str, Any]) -> ConfigDict:
    """A copy of the config with fields set by path. Raises ValueError for unknown ones."""
    changed = copy.deepcopy(base)
    for field, value in overrides.items():
        *sections, last = field.split(".")
        section = changed
        for name in sections:
            section = _get(section, name, field)
        if isinstance(_get(section, last, field), ConfigDict):
            raise ValueError(f"get_sweep(): {field} is a section; set its fields, as {field}.NAME.")
        try:
            section[last] = _plain(value)
        except (TypeError, ValueError) as error:
            raise ValueError(f"get_sweep(): {field}={value!r} has the wrong type.") from error
    return changed


def _get(section: Any, name: str, field: str) -> Any:
    if not isinstance(section, ConfigDict) or name not in section:
        known = section if isinstance(section, ConfigDict) else ()
        raise ValueError(
            f"get_sweep(): {field} is not a config field. {names.did_you_mean(name, known)}"
        )
    return section[name]


def _plain(value: Any) -> Any:
    """Numpy numbers as Python's, lists as tuples."""
    value = value.item() if hasattr(value, "item") else value
    return tuple(value) if isinstance(value, list) else value
