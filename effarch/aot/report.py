"""One config on one target: compile, read, and say in words."""

import dataclasses
import time

import jax

from effarch.aot import advice, collectives, costs, hlo, memory, products
from effarch.aot import plan as plan_lib
from effarch.kernels import dispatch, platform
from effarch.parallel import topologies
from effarch.training import formatting
from effarch.training import setup as setup_lib


@dataclasses.dataclass(frozen=True)
class Report:
    """What a step costs on the target. Seconds and bytes are of one step on one device."""

    name: str
    target: str
    mesh: dict[str, int]
    tokens: int
    """In a step, over all devices."""
    params: int
    params_active: int
    flops: float
    """Of a step over all devices, by formula: the model's."""
    flops_hardware: float
    """The same with what kernels and `model.remat` compute beside it."""
    backends: dict[str, str]
    """What each of the kernels' operations runs on."""
    memory: memory.Memory
    compile_seconds: float
    collectives: list[dict]
    """Empty if the step does not fit and the compiler said no more."""
    products: dict[str, int]
    """Types of the operands -> matrix products of a step on one device, outside of kernels."""
    floors: dict[str, float] | None
    """The least time for compute, HBM and network; None if there is no program."""
    seconds: float | None
    """The estimate: operations, and what of the network cannot run beside them."""
    peak_flops: float
    """Of all devices together."""
    unknown_loops: int
    """Loops whose length the compiled text does not tell: counted once, so the times are too short."""
    shrink: int
    """Predicted: by how much micro-batches must shrink to fit; 1 if they fit or hold one row."""
    changes: list[advice.Change]
    """Predictions of what would make it fit; empty if it fits."""

    @property
    def bound(self) -> str | None:
        """Which floor is highest."""
        return max(self.floors, key=self.floors.get) if self.floors else None

    @property
    def mfu(self) -> float | None:
        """Formula FLOPs over what the devices could do in the estimated time."""
        return self.flops / (self.seconds * self.peak_flops) if self.seconds else None

    @property
    def hfu(self) -> float | None:
        """The same of what is really computed."""
        return self.mfu * self.flops_hardware / self.flops if self.seconds else None

    def to_dict(self) -> dict:
        """Everything as plain values, for JSON."""
        rest = {"fits": self.memory.fits, "total": self.memory.total}
        return dataclasses.asdict(self) | {
            "memory": dataclasses.asdict(self.memory) | rest,
            "bound": self.bound,
            "mfu": self.mfu,
            "hfu": self.hfu,
        }


def compile_step(config, target: topologies.Target) -> Report:
    """Compiles the train step for the target and reads the result. Raises ValueError."""
    with platform.tracing_for(target.device.platform):
        return _compile_step(config, target)


def _compile_step(config, target: topologies.Target) -> Report:
    setup = plan_lib.plan(config, target)
    with dispatch.noted() as backends:
        lowered = plan_lib.lower(setup)
    state = memory.state_bytes(setup.abstract, setup.shardings)
    capacity = target.device.hbm
    start = time.perf_counter()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        held = memory.read_failure(str(error), state, capacity)
        if held is None:
            raise
        return _report(setup, target, backends, held, time.perf_counter() - start, None)
    seconds = time.perf_counter() - start
    program = hlo.parse(compiled.as_text())
    held = memory.read(compiled, state, capacity)
    return _report(setup, target, backends, held, seconds, program)


def _report(setup: setup_lib.Setup, target, backends, held, compile_seconds, program) -> Report:
    flops = setup.counts.flops_per_token * setup.tokens_per_step
    peak = target.device.peak_flops * target.num_devices
    found, floors, seconds = [], None, None
    if program is not None:
        found = collectives.read(program, target)
        cost = costs.read(program, target)
        floors = {
            "compute": flops / peak,
            "HBM": cost.hbm_bytes / target.device.hbm_bandwidth,
            "network": sum(one.executions * one.seconds for one in found),
        }
        seconds = max(_estimate(cost, found), *floors.values())
    return Report(
        name=setup.config.name,
        target=str(target),
        mesh=dict(setup.layout.mesh.shape),
        tokens=setup.tokens_per_step,
        params=setup.counts.params_total,
        params_active=setup.counts.params_active,
        flops=flops,
        flops_hardware=setup.counts.flops_hardware * setup.tokens_per_step,
        backends=backends,
        memory=held,
        compile_seconds=compile_seconds,
        collectives=collectives.totals(found),
        products=products.read(program) if program else {},
        floors=floors,
        seconds=seconds,
        peak_flops=peak,
        unknown_loops=len(program.unknown_loops) if program else 0,
        shrink=advice.micro_batches(setup, held),
        changes=[] if held.fits else advice.changes(setup, held),
    )


def _estimate(cost: costs.Costs, found: list[collectives.Collective]) -> float:
    """Asynchronous collectives run beside the operations, the others after them."""
    waiting = {True: 0.0, False: 0.0}
    for one in found:
        waiting[one.is_async] += one.executions * one.seconds
    return max(cost.seconds, waiting[True]) + waiting[False]


def rows(report: Report) -> list[tuple[str, str]]:
    """The report for a person."""
    held, count = report.memory, formatting.count
    axes = [f"{axis} {size}" for axis, size in report.mesh.items() if size > 1]
    lines = [
        ("target", f"{report.target}, mesh {', '.join(axes) or 'of one device'}"),
        ("parameters", f"{count(report.params)}, active {count(report.params_active)}"),
        (
            "step",
            f"{report.tokens:,} tokens, {count(report.flops)} FLOPs by formula, "
            f"{count(report.flops_hardware)} on the hardware",
        ),
        ("kernels", ", ".join(f"{op} {name}" for op, name in sorted(report.backends.items()))),
        ("compile time", formatting.duration(report.compile_seconds)),
        (
            "HBM a device",
            f"state {gib(held.state)} + batch {gib(held.batch)} + activations, gradients and "
            f"workspace {gib(held.temporary)} = {gib(held.total)} of {gib(held.capacity)}",
        ),
        ("fits", "yes" if held.fits else "no"),
    ]
    for change in report.changes:
        verdict = "would fit" if change.fits else "would not fit"
        lines.append((f"  {change.setting}", f"{verdict}: about {gib(change.total)} (predicted)"))
    for row in report.collectives:
        text = f"{row['count']:,} over {row['devices']} devices, {gib(row['bytes'])} a device"
        lines.append((row["kind"], f"{text}, at least {milliseconds(row['seconds'])}"))
    if report.products:
        types = [f"{number:,} {types}" for types, number in report.products.items()]
        lines.append(("products", ", ".join(types)))
    if report.unknown_loops:
        text = f"{report.unknown_loops} loops of unknown length count once: times are too short"
        lines.append(("warning", text))
    if report.seconds is not None:
        floors = ", ".join(f"{name} {milliseconds(s)}" for name, s in report.floors.items())
        rate = report.tokens / report.seconds
        lines += [
            ("least time", f"{floors}: bound by {report.bound}"),
            (
                "estimate",
                f"{milliseconds(report.seconds)} a step, {count(rate)} tokens/s, "
                f"MFU {report.mfu:.1%}, HFU {report.hfu:.1%}",
            ),
        ]
    return lines


def gib(number: float) -> str:
    """Bytes in GiB, or MiB below a tenth of one."""
    if number < 0.1 * 2**30:
        return f"{number / 2**20:.1f} MiB"
    return f"{number / 2**30:.2f} GiB"


def milliseconds(seconds: float) -> str:
    """Seconds as ms, or s above ten of them."""
    return f"{seconds:.1f} s" if seconds >= 10 else f"{1e3 * seconds:.3g} ms"
