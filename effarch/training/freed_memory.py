"""Keeping freed memory in the process on Linux CPUs.

XLA's step frees and takes about a gigabyte of temporaries. glibc gives large blocks back to the system,
which then clears every page of the next ones: on two cores a fifth of the processor time of the
quickstart's step.
"""

import ctypes
import sys

import jax
from absl import logging

_MMAP_MAX, _TRIM_THRESHOLD, _ARENA_MAX, _TOP_PAD = -4, -1, -8, -2  # mallopt's names, from malloc.h


def keep() -> None:
    """Asks glibc not to return freed memory; elsewhere, and on accelerators, it changes nothing."""
    if not sys.platform.startswith("linux") or jax.default_backend() != "cpu":
        return
    settings = {_MMAP_MAX: 0, _TRIM_THRESHOLD: 2**31 - 1, _ARENA_MAX: 1, _TOP_PAD: 64 * 2**20}
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):  # another C library
        return
    refused = [name for name, value in settings.items() if mallopt(name, value) != 1]
    if refused:
        logging.info("mallopt refused the settings %s: steps may be slower.", refused)
