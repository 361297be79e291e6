"""Free memory, and reuse of freed memory by the C library."""

import ctypes
import platform
from pathlib import Path

import psutil

CGROUP = Path("/sys/fs/cgroup")

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_GIGABYTE = 1 << 30
_OLD_MAXIMUM = 32 << 20
"""Largest threshold that older versions of glibc accept. They reject a larger one and stay at 128 kB."""


def keep_freed_memory() -> None:
    """Make glibc reuse freed blocks of up to a gigabyte; do nothing with other C libraries.

    By default, glibc returns every large block to the system, which then has to clear each page for the next batch.
    That costs a quarter of the time of a convolutional network on a CPU.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_TRIM_THRESHOLD, _GIGABYTE)
        if not libc.mallopt(_M_MMAP_THRESHOLD, _GIGABYTE):
            libc.mallopt(_M_MMAP_THRESHOLD, _OLD_MAXIMUM)


def free_memory() -> int:
    """Return the bytes that this process may still allocate: of the machine, or of its container if that is less."""
    available = int(psutil.virtual_memory().available)
    try:
        limit, used = (int((CGROUP / f"memory.{name}").read_text()) for name in ("max", "current"))
        usage = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # no control group (version 2), or no limit ("max")
        return available
    # The kernel counts its file cache as used, and drops it when memory is needed.
    return min(available, limit - used + int(usage["inactive_file"]))
