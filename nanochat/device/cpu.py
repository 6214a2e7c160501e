"""The CPU: what it says of itself, and how its memory is allocated."""

import ctypes
from pathlib import Path


def cpu_flags() -> set[str]:
    """Feature flags of the first CPU; empty if the system does not list them."""
    return set(cpuinfo("flags").split())


def cpuinfo(key: str) -> str:
    """The first CPU's entry `key` in /proc/cpuinfo, or ""."""
    try:
        pairs = (line.partition(":") for line in Path("/proc/cpuinfo").read_text().splitlines())
        return next((value.strip() for name, _, value in pairs if name.strip() == key), "")
    except OSError:
        return ""


def keep_freed_memory() -> None:
    """Make glibc keep freed memory for the next allocation. Does nothing with other C libraries.

    By default it returns every block above 32 MiB to the system, and each training step allocates the same ones: the
    kernel then maps and clears all their pages again, which takes up to a fifth of a step (dev/LOG.md).
    """
    M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3  # from malloc.h
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library
        return
    mallopt(M_MMAP_THRESHOLD, 2**30)
    mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    mallopt(M_TOP_PAD, 2**26)
