"""How this process treats the memory that it frees."""

from __future__ import annotations

import ctypes
import platform
from pathlib import Path

ACCELERATORS = ("nvidia[0-9]*", "kfd", "dxg", "accel*", "vfio/[0-9]*")
"""Files in /dev of a machine with a GPU or a TPU."""

ARENA_MAX, MMAP_MAX, TRIM_THRESHOLD = -8, -4, -1  # of glibc's malloc.h
LARGEST_GAP, SMALLEST_GAP = 1 << 30, 1 << 12  # bytes

_keeps_freed = False


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
    global _keeps_freed
    _keeps_freed = True
    mallopt = ctypes.CDLL(None).mallopt
    mallopt(ARENA_MAX, 1)
    mallopt(MMAP_MAX, 0)
    mallopt(TRIM_THRESHOLD, -1)  # -1: never


def discard_gaps() -> None:
    """Takes the free blocks between used ones out of use. Their pages go back to the kernel.

    Compiling the quick start's step leaves 40,000 of them. Later, each large block that a program
    asks for is searched among them, while other threads wait: the step took a third longer. Does
    nothing where `keep_freed` did nothing.
    """
    if not _keeps_freed:
        return
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    libc.malloc_trim(0)
    end = libc.malloc(LARGEST_GAP)  # fits in no gap, so it lies behind all of them
    size = LARGEST_GAP
    while end and size > SMALLEST_GAP:
        size //= 2
        while (block := libc.malloc(size)) and block < end:
            pass  # taken for good
        libc.free(block)
    libc.free(end)
