"""How this process treats the memory that it frees."""

from __future__ import annotations

import ctypes
import platform
from pathlib import Path

ACCELERATORS = ("nvidia[0-9]*", "kfd", "dxg", "accel*", "vfio/[0-9]*")
"""Files in /dev of a machine with a GPU or a TPU."""

ARENA_MAX, MMAP_MAX, TRIM_THRESHOLD = -8, -4, -1  # of glibc's malloc.h


def keep_freed() -> None:
    """On a machine without an accelerator, returns no freed memory to the kernel.

    XLA for CPUs asks for its temporary memory anew each time that a program runs. glibc maps such
    large blocks and unmaps them again, and the kernel clears every page: a fifth of the time of the
    quick start's step. It must be called before the process has a second thread, whose own arena
    would map them nevertheless. Other C libraries are left alone.
    """
    devices = Path("/dev")
    if platform.libc_ver()[0] != "glibc" or any(any(devices.glob(p)) for p in ACCELERATORS):
        return
    mallopt = ctypes.CDLL(None).mallopt
    mallopt(ARENA_MAX, 1)
    mallopt(MMAP_MAX, 0)
    mallopt(TRIM_THRESHOLD, -1)  # -1: never
