"""What a config file's `get_sweep()` is made of: lists of runs, each a dict of config overrides.

    def get_sweep(arg=""):
        return sweeps.product(
            {"model.layers": ["attention/glu", "3*gated_delta_net/glu + attention/glu"]},
            sweeps.together({"optimizer.learning_rate": [1e-3, 5e-4], "model.width": [256, 512]}),
            {"seed": range(3)},
        )

makes 2 x 2 x 3 = 12 runs. Fields are paths in the config; `python -m effarch.sweep` runs them.
"""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from effarch.training import schedules

MOST_CHECKPOINTS = 100
"""That `lengths` lets the longest run keep."""
Runs = list[dict[str, Any]]
Part = Mapping[str, Iterable[Any]] | Sequence[Mapping[str, Any]]
"""Field -> values, which stands for one run a combination of values; or a list of runs."""


def product(*parts: Part) -> Runs:
    """Every combination of the parts; the last one changes fastest."""
    runs = []
    for combination in itertools.product(*map(_runs, parts)):
        run: dict[str, Any] = {}
        for overrides in combination:
            twice = sorted(run.keys() & overrides.keys())
            if twice:
                raise ValueError(
                    f"get_sweep(): {twice[0]} is set by two parts of a product; set it in one."
                )
            run |= overrides
        runs.append(run)
    return runs


def together(values: Mapping[str, Iterable[Any]]) -> Runs:
    """Run i takes the i-th value of every field."""
    columns = {field: list(column) for field, column in values.items()}
    lengths = {field: len(column) for field, column in columns.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"get_sweep(): together() needs equally many values, it has {lengths}.")
    return [dict(zip(columns, row)) for row in zip(*columns.values())]


def chain(*parts: Part) -> Runs:
    """The runs of one part after those of another."""
    return [run for part in parts for run in _runs(part)]


def configs(base: ConfigDict, others: Iterable[ConfigDict]) -> Runs:
    """Whole configs as runs of a sweep: the fields in which each differs from the base."""
    return [
        {
            field: value
            for field, value in _fields(other).items()
            if value != _fields(base).get(field)
        }
        for other in others
    ]


def lengths(num_steps: Iterable[int], decay_fraction: float = 0.2) -> Runs:
    """Runs of several lengths with a rate that is constant but for a decay at the end (wsd).

    The sweep trains the longest one first; each of the others starts where its decay leaves that one,
    with the result of a whole run, bit for bit: effarch/training/trunk.py. The longest keeps checkpoints
    at the greatest common divisor of those starts. Raises ValueError if that is too often.
    """
    lengths = sorted(num_steps, reverse=True)
    starts = [schedules.decay_start(steps, decay_fraction) for steps in lengths]
    period = math.gcd(*starts[1:])
    if period and starts[0] // period > MOST_CHECKPOINTS:
        raise ValueError(
            f"get_sweep(): lengths({lengths}) would save every {period} steps, since the decays start "
            f"at {starts}; choose lengths with a larger common divisor, such as halves."
        )
    return [
        {
            "train.num_steps": steps,
            "optimizer.schedule.kind": "wsd",
            "optimizer.schedule.decay_fraction": decay_fraction,
            "checkpoint.every_steps": period,
            "checkpoint.keep_period": period,
        }
        for steps in lengths
    ]


def _fields(section: ConfigDict, prefix: str = "") -> dict[str, Any]:
    """path.to.field -> value."""
    found: dict[str, Any] = {}
    for name, value in section.items():
        inner = isinstance(value, ConfigDict)
        found |= _fields(value, f"{prefix}{name}.") if inner else {prefix + name: value}
    return found


def _runs(part: Part) -> Runs:
    if isinstance(part, Mapping):
        for field, values in part.items():
            if isinstance(values, str) or not isinstance(values, Iterable):
                raise ValueError(
                    f"get_sweep(): {field}={values!r} must be a list of values; write [{values!r}]."
                )
        return [dict(zip(part, row)) for row in itertools.product(*part.values())]
    return [dict(run) for run in part]
