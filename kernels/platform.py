"""Which platform the program that is being traced will run on.

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


@contextlib.contextmanager
def tracing_for(platform: str) -> Iterator[None]:
    """What is traced inside is meant for this platform, whatever devices are here."""
    token = _target.set(platform)
    try:
        yield
    finally:
        _target.reset(token)
