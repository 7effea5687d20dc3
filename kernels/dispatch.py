"""Choosing the backend of a kernel.

A backend that cannot run a case raises `Unsupported` while it is traced. Without a named backend the
next one is tried and one log line says why; a named backend never falls back.
"""

import contextlib
import contextvars
import functools
import importlib
from collections.abc import Iterator, Sequence

from absl import logging

from effarch.kernels import platform

_chosen: contextvars.ContextVar[dict[str, str] | None] = contextvars.ContextVar(
    "chosen", default=None
)
_plain: contextvars.ContextVar[bool] = contextvars.ContextVar("plain", default=False)


class Unsupported(Exception):
    """Raised by a backend at trace time: this platform or shape is not for it, with the reason."""


def preferred(backends: Sequence[str]) -> tuple[str, ...]:
    """The backends worth trying on the current platform, fastest first; always ends with `xla`."""
    native = {"tpu": "pallas_tpu", "gpu": "pallas_gpu"}.get(platform.current())
    native = None if _plain.get() else native
    return tuple(name for name in (native, "xla") if name in backends)


def call(folder: str, op: str, backends: Sequence[str], backend: str | None, *args, **kwargs):
    """Runs the operation `op` of `effarch.kernels.<folder>` on the named or the best backend.

    Each backend is the module `effarch.kernels.<folder>.<backend>` with a function named `<op>`.
    Raises ValueError for an unknown backend and `Unsupported` if a named backend cannot run.
    """
    if backend is not None:
        if backend not in backends:
            raise ValueError(
                f"{op}: backend {backend!r} does not exist; choose one of {', '.join(backends)}."
            )
        try:
            return _run(folder, op, backend, args, kwargs)
        except Unsupported as why:
            raise Unsupported(f"{op}: backend {backend!r} cannot run this: {why}.") from why
    for name in preferred(backends):
        try:
            return _run(folder, op, name, args, kwargs)
        except Unsupported as why:
            _log_once(f"{op}: not {name}: {why}")
    raise AssertionError(f"{op}: the xla backend must support every case")


def require(kind: str, interpret: bool) -> None:
    """Raises `Unsupported` unless the program is one device's work on a `kind` ("gpu", "tpu").

    For kernels that the layers use outside `shard_map`; `interpret` lets everything through.
    """
    if interpret:
        return
    if platform.current() != kind:
        where = platform.current()
        raise Unsupported(f"it runs on {kind.upper()}s, and this program is for {where}")
    if not platform.is_one_device():
        raise Unsupported("the program may be split over devices, and a kernel cannot be")


@contextlib.contextmanager
def plain() -> Iterator[None]:
    """What is traced inside prefers `xla` everywhere, for comparison."""
    token = _plain.set(True)
    try:
        yield
    finally:
        _plain.reset(token)


@contextlib.contextmanager
def noted() -> Iterator[dict[str, str]]:
    """The backend of every operation that is traced inside; several as "pallas_tpu, xla"."""
    found: dict[str, str] = {}
    token = _chosen.set(found)
    try:
        yield found
    finally:
        _chosen.reset(token)


def _run(folder: str, op: str, backend: str, args, kwargs):
    result = _load(folder, op, backend)(*args, **kwargs)
    if (found := _chosen.get()) is not None:
        before = found[op].split(", ") if op in found else []
        found[op] = ", ".join(sorted({*before, backend}))
    return result


def _load(folder: str, op: str, backend: str):
    module = importlib.import_module(f"effarch.kernels.{folder}.{backend}")
    return getattr(module, op)


@functools.cache
def _log_once(message: str) -> None:
    logging.info("%s", message)
