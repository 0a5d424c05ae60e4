"""Where a run's time goes, over all its attempts; and a watchdog for steps that do not end.

`attempts.json` in the workdir is the run's own record: a line of numbers for every time it was
started, renewed with each logged step, so that the next attempt knows what a kill has cost.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from etils import epath

from janusflow_jax.checkpoints import checksums
from janusflow_jax.config import files
from janusflow_jax.parallel import processes
from janusflow_jax.training import metrics

FILE = "attempts.json"
PHASES = ("step", "data", "compile", "checkpoint", "evaluation", "samples", "start")
"""step: on the devices, or held up by the one before; data: waiting for rows; checkpoint: waiting
for a save, not the saving; evaluation: held-out losses; samples: sheets and captions; start:
reading and restoring."""
WATCHDOG_STATUS = 70
"""Exit status of a run that its watchdog has ended."""


class Clock:
    """Splits the time since it was made among PHASES."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = dict.fromkeys(PHASES, 0.0)
        self.phase, self._since = "start", time.perf_counter()

    def switch(self, phase: str) -> None:
        """Books the time so far to the phase that was, and begins another."""
        now = time.perf_counter()
        self.seconds[self.phase] += now - self._since
        self.phase, self._since = phase, now

    @contextlib.contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        before = self.phase
        self.switch(phase)
        try:
            yield
        finally:
            self.switch(before)


class Record:
    """The attempts of a run, in its workdir."""

    def __init__(self, workdir: epath.PathLike, clock: Clock, step: int, saved_at: float | None):
        """Reads what earlier attempts left and works out what they lost.

        Args:
          step: where this attempt begins.
          saved_at: when the restored checkpoint was saved (Unix time); None: there is none.
        """
        self._file, self._clock = epath.Path(workdir) / FILE, clock
        clock.switch(clock.phase)
        began = time.time() - sum(clock.seconds.values())
        earlier = checksums.read_json(self._file) if self._file.exists() else []
        self._earlier = [_with_lost(a, saved_at) for a in earlier]
        self._mine = {"began": round(began, 3), "first_step": step, "lost": 0.0, "ended": False}
        self.write(step)

    def write(self, step: int, ended: bool = False) -> None:
        """Notes that the run is alive; `ended`: that it ends by itself, and nothing is lost."""
        self._clock.switch(self._clock.phase)
        seconds = {n: round(s, 3) for n, s in self._clock.seconds.items()}
        now = {"alive": round(time.time(), 3), "step": step, "ended": ended, "seconds": seconds}
        self._mine |= now
        if processes.is_main():
            with files.replacing(self._file, "tmp") as part:
                part.write_text(json.dumps([*self._earlier, self._mine], indent=0))

    def totals(self) -> dict[str, float]:
        """Seconds by phase over all attempts; `lost` was spent on steps that came again."""
        self._clock.switch(self._clock.phase)
        attempts = [*self._earlier, {**self._mine, "seconds": self._clock.seconds}]
        out: dict[str, float] = {n: sum(a["seconds"].get(n, 0.0) for a in attempts) for n in PHASES}
        lost = sum(a["lost"] for a in attempts)
        return {**out, "step": max(0.0, out["step"] - lost), "lost": lost}

    def values(self) -> dict[str, float]:
        """For the metrics: `time/<phase>` in seconds, `goodput` the share of kept steps."""
        totals = self.totals()
        share = totals["step"] / max(sum(totals.values()), 1e-9)
        return {"goodput": share, **{f"time/{n}": s for n, s in totals.items()}}

    def summary(self) -> str:
        """One line for the end of a run."""
        totals = self.totals()
        whole = sum(totals.values())
        shares = ", ".join(f"{n} {s / max(whole, 1e-9):.1%}" for n, s in totals.items())
        times = len(self._earlier) + 1
        after = f" in {times} attempts" if times > 1 else ""
        return f"time: {metrics.duration(whole)}{after}: {shares}"


def _with_lost(attempt: dict[str, Any], saved_at: float | None) -> dict[str, Any]:
    """An earlier attempt with what it did after the checkpoint that the run goes on from."""
    kept_until = attempt["began"] if saved_at is None else max(saved_at, attempt["began"])
    if attempt["ended"] or attempt["alive"] <= kept_until:
        return attempt
    return {**attempt, "lost": round(attempt["alive"] - kept_until, 3)}


class Watchdog:
    """Prints the stacks of all threads when no step ends for too long; may end the process.

    It watches from the first step's end on (compilation has no limit) and does nothing while a
    phase is under way that may take long: samples, evaluation.
    """

    def __init__(
        self,
        seconds: float,
        phase: Callable[[], str],
        *,
        end: bool = False,
        out: Any = None,
        exit_with: Callable[[int], None] = os._exit,
    ):
        """Args: seconds: 0: off. end: exit after the stacks. out: a file with a descriptor."""
        self._seconds, self._phase, self._end = seconds, phase, end
        self._out, self._exit = out or sys.stderr, exit_with
        self._beat: float | None = None
        self._step, self._closed = 0, threading.Event()
        if seconds > 0:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def beat(self, step: int) -> None:
        """A step has ended."""
        self._step, self._beat = step, time.monotonic()

    def close(self) -> None:
        self._closed.set()

    def _watch(self) -> None:
        while not self._closed.wait(min(1.0, self._seconds / 4)):
            if self._phase() in ("samples", "evaluation"):
                self._beat = None if self._beat is None else time.monotonic()
            if self._beat is None or time.monotonic() - self._beat < self._seconds:
                continue
            self._tell()
            self._beat = None  # once for each stall: the next step's end arms it again

    def _tell(self) -> None:
        print(
            f"WATCHDOG: process {processes.index()}: no step has ended for {self._seconds:g} s "
            f"since step {self._step} (watchdog_s); the loop is in: {self._phase()}.\n"
            "In 'data' the records are slow or the store hangs; in 'step' a device hangs, or "
            "another process of the job has died or waits (compare the stacks of all processes); "
            "in 'checkpoint' the store hangs. A longer step is no fault: raise watchdog_s. "
            + ("This process ends now. " if self._end else "The run goes on waiting. ")
            + "Stacks of all threads:",
            file=self._out,
            flush=True,
        )
        faulthandler.dump_traceback(self._out, all_threads=True)
        if self._end:
            self._exit(WATCHDOG_STATUS)
