"""The fastest setting that fits, by compiling: rematerialisation, mesh, micro-batches as needed."""

import math
from collections.abc import Iterator

from ml_collections import ConfigDict

from effarch.aot import report
from effarch.parallel import topologies

REMAT = ("none", "selective", "full")
"""From what keeps most to what keeps least."""
TRIES = 3
"""Compiles for one mesh and rematerialisation: as asked, as predicted to fit, half of that."""

Settings = dict[str, int | str]


def run(config: ConfigDict, target: topologies.Target) -> Iterator[tuple[Settings, report.Report]]:
    """Every setting that was compiled, with its report, as it is done."""
    for mesh in meshes(config, target):
        for remat in REMAT:
            for settings, found in _grow(config, target, mesh | {"model.remat": remat}):
                yield settings, found
            if found.memory.fits and settings["train.accumulate"] == config.train.accumulate:
                break  # keeping less would only recompute more


def best(done: list[tuple[Settings, report.Report]]) -> tuple[Settings, report.Report] | None:
    """The least estimated time of a step among what fits."""
    fitting = [pair for pair in done if pair[1].memory.fits]
    return min(fitting, key=lambda pair: pair[1].seconds) if fitting else None


def line(settings: Settings, found: report.Report) -> str:
    """One setting in one line."""
    text = " ".join(f"{field}={value}" for field, value in settings.items())
    held = f"{report.gib(found.memory.total)} of {report.gib(found.memory.capacity)}"
    if not found.memory.fits:
        return f"{text}: {held}, does not fit"
    return f"{text}: {held}, {report.milliseconds(found.seconds)} a step, MFU {found.mfu:.1%}"


def meshes(config: ConfigDict, target: topologies.Target) -> list[Settings]:
    """Parameters in pieces over all devices, and over the devices of a host with replicas of that."""
    axes = config.mesh
    rest = target.num_devices // math.prod((axes.expert, axes.context, axes.tensor))
    pieces = [rest]
    host = target.devices_per_host
    if host and rest > host and rest % host == 0:
        pieces.append(host)
    return [{"mesh.data": rest // fsdp, "mesh.fsdp": fsdp} for fsdp in pieces]


def _grow(config, target, settings: Settings) -> Iterator[tuple[Settings, report.Report]]:
    """More micro-batches until the step fits or one has a single row."""
    accumulate = config.train.accumulate
    for _ in range(TRIES):
        settings = settings | {"train.accumulate": accumulate}
        candidate = config.copy_and_resolve_references()
        candidate.update_from_flattened_dict(settings)
        found = report.compile_step(candidate, target)
        yield settings, found
        if found.memory.fits or found.shrink == 1:
            return
        accumulate *= found.shrink
