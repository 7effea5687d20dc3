"""Machines to compile for without having them: what they are, and their devices as JAX describes them.

`v5p:4x4x4` is a TPU and the shape of its slice in chips; `h100:1x8x8` is a GPU and slices x hosts x
GPUs a host; a bare name is one chip. Needs the wheels of the extra `aot`, no accelerator.
"""

import dataclasses
import importlib.util
import math
import re

import jax
from jax.experimental import topologies

from effarch import names
from effarch.parallel import mesh as mesh_lib


@dataclasses.dataclass(frozen=True)
class Device:
    """What JAX calls one device: a chip, or one half of a tpu7x chip. All figures are per device."""

    name: str
    platform: str
    """`tpu` or `gpu`."""
    peak_flops: float
    """Dense bfloat16 FLOP/s."""
    hbm: float
    """Bytes that a program can use."""
    hbm_bandwidth: float
    """Bytes/s."""
    link_bandwidth: float
    """Bytes/s that arrive over all links: between chips (TPU) or in a host (NVLink)."""
    network_bandwidth: float | None = None
    """Bytes/s that arrive from other hosts; None where the links join all chips (TPU)."""
    per_chip: int = 1
    axes: int = 3
    """Numbers in a topology: the torus' dimensions, or slices x hosts x GPUs."""
    clock: float | None = None
    """Cycles/s in which the compiler states its estimates (TPU): peak / FLOPs a cycle."""
    source: str = ""


GIB = 2.0**30
_CLOUD = "cloud.google.com/tpu/docs, page "
DEVICES = {
    device.name: device
    for device in (
        # Usable HBM is what the compiler states; half of the two-way link figure arrives.
        Device(
            *("v5e", "tpu", 197e12, 15.75 * GIB, 819e9, 200e9),
            axes=2,
            clock=1.5e9,
            source=_CLOUD + "v5e",
        ),
        Device(
            *("v5p", "tpu", 459e12, 95.73 * GIB, 2765e9, 600e9),
            clock=1.75e9,
            source=_CLOUD + "v5p",
        ),
        Device(
            *("v6e", "tpu", 918e12, 31.24 * GIB, 1638e9, 400e9),
            axes=2,
            clock=1.75e9,
            source=_CLOUD + "v6e",
        ),
        Device(
            *("tpu7x", "tpu", 1153.5e12, 94.74 * GIB, 3690e9, 300e9),
            per_chip=2,
            clock=2.2e9,
            source=_CLOUD + "tpu7x, per chip, halved",
        ),
        Device(
            *("a100", "gpu", 312e12, 80e9, 2039e9, 300e9, 25e9),
            source="NVIDIA A100 80GB SXM data sheet; DGX A100: a 200 Gb/s adapter a GPU",
        ),
        Device(
            *("h100", "gpu", 989e12, 80e9, 3350e9, 450e9, 50e9),
            source="NVIDIA H100 SXM data sheet; DGX H100: a 400 Gb/s adapter a GPU",
        ),
        Device(
            *("b200", "gpu", 2250e12, 180e9, 8000e9, 900e9, 50e9),
            source="NVIDIA DGX B200 data sheet, an eighth; a 400 Gb/s adapter a GPU",
        ),
    )
}

# Compute capability; multiprocessors; bytes of L2; clock in GHz; shared memory a block (opted in)
# and a multiprocessor. CUDA C programming guide, table of compute capabilities; data sheets.
_GPUS = {
    "a100": ((8, 0), 108, 41943040, 1.41, 166912, 167936, "NVIDIA A100-SXM4-80GB"),
    "h100": ((9, 0), 132, 52428800, 1.98, 232448, 233472, "NVIDIA H100 80GB HBM3"),
    "b200": ((10, 0), 148, 132120576, 1.965, 232448, 233472, "NVIDIA B200"),
}
_WHEELS = {
    "tpu": ("libtpu",),
    "gpu": ("jax_plugins.xla_cuda13", "jax_cuda13_plugin"),
}


@dataclasses.dataclass(frozen=True)
class Target:
    """A device and the topology in which many of it stand."""

    device: Device
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.device.name}:{'x'.join(map(str, self.shape))}"

    @property
    def num_chips(self) -> int:
        return math.prod(self.shape)

    @property
    def num_devices(self) -> int:
        return self.num_chips * self.device.per_chip

    @property
    def devices_per_host(self) -> int | None:
        """GPUs that NVLink joins; None where links join all devices."""
        return self.shape[-1] if self.device.platform == "gpu" else None


def parse(text: str) -> Target:
    """`v5p:4x4x4`, `h100:1x8x8`, `h100` (one). Raises ValueError."""
    name, _, topology = text.partition(":")
    device = names.lookup(DEVICES, name, "--target")
    topology = topology or "x".join("1" * device.axes)
    if not re.fullmatch(rf"[1-9]\d*(x[1-9]\d*){{{device.axes - 1}}}", topology):
        meaning = "slices x hosts x GPUs a host" if device.platform == "gpu" else "chips"
        example = "1x1x8" if device.platform == "gpu" else "x".join("4" * device.axes)
        raise ValueError(
            f"--target={text}: the topology of {name} is {device.axes} numbers ({meaning}), as in "
            f"{name}:{example}."
        )
    return Target(device, tuple(int(size) for size in topology.split("x")))


def describe() -> list[dict]:
    """Every device with its figures and one line for a person."""
    rows = []
    for device in DEVICES.values():
        example = "1x8x8" if device.platform == "gpu" else "x".join("4" * device.axes)
        network = device.network_bandwidth
        text = (
            f"{device.name:<6} {device.peak_flops / 1e12:6.0f} TFLOP/s, "
            f"{device.hbm / GIB:6.2f} GiB at {device.hbm_bandwidth / 1e9:4.0f} GB/s, "
            f"links {device.link_bandwidth / 1e9:.0f} GB/s"
            f"{f', network {network / 1e9:.0f} GB/s' if network else ''}; "
            f"as {device.name}:{example}{', two devices a chip' if device.per_chip == 2 else ''}"
            f" ({device.source})"
        )
        rows.append(dataclasses.asdict(device) | {"text": text})
    return rows


def devices(target: Target) -> list[jax.Device]:
    """The target's devices, to compile for. Raises ValueError if wheels or the topology are missing."""
    _check_wheels(target)
    options, name = {}, str(target)
    if target.device.platform == "gpu":
        topology = "x".join(map(str, target.shape))
        options = dict(target_config=_gpu_description(target.device), topology=topology)
    platform = {"gpu": "cuda", "tpu": "tpu"}[target.device.platform]
    try:
        return topologies.get_topology_desc(name, platform, **options).devices
    except (jax.errors.JaxRuntimeError, NotImplementedError) as error:
        raise ValueError(
            f"--target={target}: the compiler does not give this topology ({error}); see --list_targets."
        ) from error


def mesh(target: Target, sizes) -> jax.sharding.Mesh:
    """The mesh of a run on the target; `sizes` is the section `mesh` of a config."""
    shape = mesh_lib.resolve(sizes, target.num_devices)
    return mesh_lib.make(shape, devices(target))


def missing_wheels(target: Target) -> list[str]:
    """Modules of the target's compiler that are not installed."""
    return [name for name in _WHEELS[target.device.platform] if not _is_installed(name)]


def _check_wheels(target: Target) -> None:
    if missing := missing_wheels(target):
        raise ValueError(
            f"--target={target} needs the compiler for it, and {', '.join(missing)} cannot be "
            f"imported: pip install 'effarch[aot]' (a laptop will do; no accelerator is used)."
        )


def _is_installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def _gpu_description(device: Device) -> str:
    """XLA's GpuTargetConfigProto as text."""
    (major, minor), cores, cache, clock, block, core, kind = _GPUS[device.name]
    return f"""
gpu_device_info {{
  cuda_compute_capability {{ major: {major} minor: {minor} }}
  core_count: {cores} fpus_per_core: 128 threads_per_core_limit: 2048 threads_per_warp: 32
  threads_per_block_limit: 1024 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535
  block_dim_limit_z: 65535 registers_per_core_limit: 65536 registers_per_block_limit: 65536
  shared_memory_per_block: 49152 shared_memory_per_block_optin: {block}
  shared_memory_per_core: {core} l2_cache_size: {cache} clock_rate_ghz: {clock}
  memory_bandwidth: {int(device.hbm_bandwidth)} device_memory_size: {int(device.hbm)}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 8 patch: 0 }}
runtime_version {{ major: 13 minor: 0 patch: 0 }}
device_description_str: "{kind}"
"""
