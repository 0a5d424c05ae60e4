"""Ctrl-C and SIGTERM end a command at once, with one line and nothing half written.

An exception would not: JAX's callback of the garbage collector swallows it, and where it gets
through, XLA's threads crash while Python shuts down.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from typing import Any, NoReturn

from janusflow_jax.config import files

_BUSY_S = 2.0
_advice, _ending = "", False


def end_on_signals(advice: str = "") -> None:
    """Installs the handlers. A command calls it before its imports, which take seconds.

    Whoever installs another handler later is responsible for that signal.

    Args: advice: what a second run of the same command does.
    """
    global _advice
    _advice = advice
    read, write = os.pipe()
    os.set_blocking(write, False)
    signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as `nohup` and `&` of a script do
            signal.signal(number, end)
    threading.Thread(target=_end_if_busy, args=(read,), name="signals", daemon=True).start()


def end(number: int, _: Any = None) -> NoReturn:
    """The handler: removes files and folders that are not whole, ends workers and the process."""
    global _ending
    _ending = True
    text = f"\nstopped by {signal.Signals(number).name}" + (_advice and f"; {_advice}")
    with contextlib.suppress(OSError):  # whoever read it may be gone
        os.write(2, f"{text}\n".encode())
    if "multiprocessing" in sys.modules:
        for child in sys.modules["multiprocessing"].active_children():
            child.kill()
    files.remove_unfinished()
    with contextlib.suppress(Exception):  # the signal may have come while the buffer was in use
        sys.stdout.flush()
    os._exit(128 + number)


def _end_if_busy(read: int) -> None:
    """In a thread: ends the process where the main thread does not come to it.

    Python calls `end` between two instructions of the main thread, which may be minutes away: it
    compiles, or waits for a device.
    """
    while received := os.read(read, 1):
        number = received[0]
        if signal.getsignal(number) is end:
            time.sleep(_BUSY_S)
            if not _ending:
                end(number)
