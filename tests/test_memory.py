"""What a command does with freed memory (janusflow_jax/memory.py), in processes of their own."""

import platform
import subprocess
import sys
from pathlib import Path

import pytest

from janusflow_jax import memory

ROOT = Path(__file__).parents[1]
HAS_ACCELERATOR = any(any(Path("/dev").glob(p)) for p in memory.ACCELERATORS)
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
    assert run.stdout.strip() == str(keeps and not HAS_ACCELERATOR), run.stderr


GAPS = """
import ctypes, os, sys
sys.argv[0] = sys.argv[1]
from janusflow_jax import memory
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
size = 1 << 20
blocks = [libc.malloc(size) for _ in range(100)]
for block in blocks[::2]:
    ctypes.memset(block, 1, size)
    libc.free(block)
pages = lambda: int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGESIZE")
held = pages()
memory.discard_gaps()
print(held - pages() > 40 * size, max(blocks) < libc.malloc(size // 2))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's malloc only")
@pytest.mark.parametrize("keeps", [True, False])
def test_gaps_are_never_used_again(keeps):
    """Their pages go back, and the next block lies behind them; in any other program, nothing."""
    command = [sys.executable, "-c", GAPS, "-m" if keeps else "x"]
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    expected = str(keeps and not HAS_ACCELERATOR)
    assert run.stdout.split() == [expected, expected], run.stderr
