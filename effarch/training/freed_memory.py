"""Keeping freed memory in the process on Linux CPUs.

XLA takes the temporaries of a step as one block, hundreds of megabytes, and frees it afterwards. glibc
gives such blocks back to the system, which then clears every page of the next one: in the quickstart
80,000 pages a step, a fifth of the processor time.
"""

import ctypes
import importlib.util
import os
import sys

from absl import logging

_MMAP_MAX, _TRIM_THRESHOLD, _ARENA_MAX, _TOP_PAD = -4, -1, -8, -2  # mallopt's names, from malloc.h


def keep() -> None:
    """Asks glibc not to return freed memory; call it before JAX starts its threads.

    That is before a config is read, because some configs count FLOPs with JAX: a thread that has
    allocated keeps an arena of its own, whose large blocks are returned whatever is asked. Where JAX
    may use an accelerator, and on other systems, nothing is changed.
    """
    if not sys.platform.startswith("linux") or not _on_cpu():
        return
    settings = {_MMAP_MAX: 0, _TRIM_THRESHOLD: -1, _ARENA_MAX: 1, _TOP_PAD: 64 * 2**20}
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):  # another C library
        return
    refused = [name for name, value in settings.items() if mallopt(name, value) != 1]
    if refused:
        logging.info("mallopt refused the settings %s: steps may be slower.", refused)


def _on_cpu() -> bool:
    """Whether JAX will use the CPU, told without importing it."""
    chosen = os.environ.get("JAX_PLATFORMS")
    if chosen:
        return chosen.split(",")[0] == "cpu"
    return not any(importlib.util.find_spec(name) for name in ("jax_plugins", "libtpu"))
