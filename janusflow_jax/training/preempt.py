"""Being told to stop: SIGTERM (how clusters announce that a machine is taken away) and Ctrl-C."""

from __future__ import annotations

import os
import signal
from typing import Any


class Stop:
    """Remembers SIGTERM and Ctrl-C for the loop to see; a second one ends at once.

    One process of a job being told is enough: the loop lets all of them agree
    (`distributed.Agreement`).
    """

    def __init__(self) -> None:
        self.signal = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Stop:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _remember(self, number: int, _: Any) -> None:
        if self.signal:
            raise KeyboardInterrupt
        self.signal = number
        # No print: its buffer may be in use where the signal fell.
        os.write(1, b"stopping: saving a checkpoint at the next step\n")
