"""How this process treats the memory that it frees."""

from __future__ import annotations

import ctypes
import mmap
import platform
from pathlib import Path

ACCELERATORS = ("nvidia[0-9]*", "kfd", "dxg", "accel*", "vfio/[0-9]*")
"""Files in /dev of a machine with a GPU or a TPU."""

ARENA_MAX, MMAP_MAX, TRIM_THRESHOLD = -8, -4, -1  # of glibc's malloc.h
LARGEST_GAP, SMALLEST_GAP = 1 << 29, 1 << 12  # bytes

_heap = 0  # address of the heap's end when `keep_freed` was called; 0: it was not, or had no effect


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
    global _heap
    libc = ctypes.CDLL(None)
    libc.mallopt(ARENA_MAX, 1)
    libc.mallopt(MMAP_MAX, 0)
    libc.mallopt(TRIM_THRESHOLD, -1)  # -1: never
    libc.sbrk.restype, libc.sbrk.argtypes = ctypes.c_void_p, [ctypes.c_ssize_t]
    _heap = libc.sbrk(0)


def discard_gaps() -> None:
    """Takes the free blocks between used ones out of use. Their pages go back to the kernel.

    Compiling the quick start's step leaves 40,000 of them. Later, malloc searches them for each
    large block, while other threads wait: the step took a quarter longer. Does nothing where
    `keep_freed` did nothing.
    """
    if not _heap:
        return
    libc = ctypes.CDLL(None)
    libc.sbrk.restype, libc.sbrk.argtypes = ctypes.c_void_p, [ctypes.c_ssize_t]
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    libc.malloc_trim(0)  # leaves less than two pages free at the heap's end
    end = libc.sbrk(0) - 2 * mmap.PAGESIZE
    size = LARGEST_GAP
    while size >= SMALLEST_GAP:
        for _ in range((end - _heap) // size):  # more gaps have no room
            block = libc.malloc(size)
            if not block or block >= end:
                libc.free(block)
                break
        size //= 2
