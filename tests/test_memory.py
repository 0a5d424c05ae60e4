"""What a command does with freed memory (janusflow_jax/memory.py), in processes of their own."""

import platform
import subprocess
import sys
from pathlib import Path

import pytest

from janusflow_jax import memory

ROOT = Path(__file__).parents[1]
FREE = """
import ctypes, os, sys
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
size = 64 << 20
block = libc.malloc(size)
ctypes.memset(block, 1, size)
libc.free(block)
pages = int(open("/proc/self/statm").read().split()[1])
print(pages * os.sysconf("SC_PAGESIZE") > size)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's malloc only")
@pytest.mark.parametrize("keeps", [True, False])
def test_freed_memory_stays_with_a_command(keeps):
    """As `python -m` imports the package, and as any other program does."""
    before = f"import sys; sys.argv[0] = {'-m' if keeps else 'x'!r}; import janusflow_jax"
    run = subprocess.run(
        [sys.executable, "-c", f"{before}\n{FREE}"], capture_output=True, text=True, cwd=ROOT
    )
    has_accelerator = any(any(Path("/dev").glob(p)) for p in memory.ACCELERATORS)
    assert run.stdout.strip() == str(keeps and not has_accelerator), run.stderr
