"""Which platform the program that is being traced will run on, and whether one device runs it.

Usually that of the default device. A program that is compiled for machines that are not there is
traced under `tracing_for`, so that "auto" and the choice of a backend mean what the target would choose.
"""

import contextlib
import contextvars
from collections.abc import Iterator

import jax

_target: contextvars.ContextVar[str | None] = contextvars.ContextVar("target", default=None)


def current() -> str:
    """`cpu`, `gpu` or `tpu`."""
    return _target.get() or jax.default_backend()


def is_one_device() -> bool:
    """Whether what is traced is one device's own work: alone, or a piece inside `jax.shard_map`.

    A kernel that is not plain JAX must know: XLA cannot split it. Where no mesh is set nobody can tell
    before compiling; then it is so if there is but one device.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return jax.device_count() == 1
    manual = jax.sharding.AxisType.Manual
    return all(kind == manual or size == 1 for kind, size in zip(mesh.axis_types, mesh.axis_sizes))


@contextlib.contextmanager
def tracing_for(platform: str) -> Iterator[None]:
    """What is traced inside is meant for this platform, whatever devices are here."""
    token = _target.set(platform)
    try:
        yield
    finally:
        _target.reset(token)
