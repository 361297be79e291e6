"""What the libraries below torch do with memory that is free and with cores that wait."""

import ctypes
import os
import platform

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_GIGABYTE = 1 << 30
_MOST_BEFORE = 32 << 20
"""What older versions of glibc take at most; refused, the threshold would stay at 128 kB."""


def keep_freed_memory() -> None:
    """Tell glibc to keep blocks of up to a gigabyte when they are freed; elsewhere do nothing.

    By default it hands every large block back to the system, which then clears each page again for the next batch: a
    quarter of the time of a convolutional network on a CPU.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_TRIM_THRESHOLD, _GIGABYTE)
        if not libc.mallopt(_M_MMAP_THRESHOLD, _GIGABYTE):
            libc.mallopt(_M_MMAP_THRESHOLD, _MOST_BEFORE)


def wait_without_spinning() -> None:
    """Let torch's threads sleep while they wait for each other; call it before torch is imported.

    By default they spin for a while on cores that the decoders need, or the very thread that is waited for.
    A user's own choice is left as it is.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
