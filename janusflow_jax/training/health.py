"""What keeps a long run healthy: where its time goes, steps that are skipped, a watchdog for steps
that hang, and signals that ask it to stop."""

from __future__ import annotations

import contextlib
import faulthandler
import json
import math
import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
from etils import epath

from janusflow_jax.checkpoints import checksums
from janusflow_jax.config import files
from janusflow_jax.config.errors import CheckpointError
from janusflow_jax.data import loader
from janusflow_jax.parallel import processes
from janusflow_jax.training import metrics

ATTEMPTS_FILE = "attempts.json"
BAD_STEPS_FILE = "bad_steps.jsonl"
PHASES = ("step", "data", "compile", "checkpoint", "evaluation", "samples", "start")
"""step: computing, or waiting for the step before; data: waiting for rows; checkpoint: waiting for
a save, which itself runs in the background; evaluation: held-out losses; samples: previews; start:
reading the start or the checkpoint."""


class Clock:
    """Splits the time since its creation among PHASES."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = dict.fromkeys(PHASES, 0.0)
        self._phase, self._since = "start", time.perf_counter()

    def switch(self, phase: str) -> None:
        """Adds the time so far to the current phase, and begins another."""
        self.update()
        self._phase = phase

    def update(self) -> None:
        """Adds the time so far to the current phase."""
        now = time.perf_counter()
        self.seconds[self._phase] += now - self._since
        self._since = now

    @contextlib.contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        before = self._phase
        self.switch(phase)
        try:
            yield
        finally:
            self.switch(before)


class Attempts:
    """`attempts.json`: one entry for every start of the run, with its seconds in each phase.

    The entry is updated with each logged step, so the next start knows what a kill has cost.
    """

    def __init__(
        self,
        workdir: epath.PathLike,
        clock: Clock,
        first_step: int,
        saved_at: float | None,
        changed_data: Sequence[str] = (),
    ):
        """Reads the earlier attempts and works out what they lost.

        Args:
          saved_at: when the restored checkpoint was saved (Unix time); None: there is none.
          changed_data: sources whose content has changed.
        """
        self._file, self._clock = epath.Path(workdir) / ATTEMPTS_FILE, clock
        clock.update()
        began = time.time() - sum(clock.seconds.values())
        self._this = {"began": round(began, 3), "first_step": first_step, "lost": 0.0}
        self._earlier: list[dict[str, Any]] = []
        if self._file.exists():
            self._read_earlier(saved_at)
        if changed_data:
            self._this["changed_data"] = list(changed_data)
        self.write(first_step)

    def _read_earlier(self, saved_at: float | None) -> None:
        """A file that cannot be used is set aside: statistics never stop a run from resuming."""
        try:
            self._earlier = checksums.read_json(self._file)
            for attempt in self._earlier:
                lost_since = max(saved_at or 0.0, attempt["began"])
                if not attempt["ended"] and attempt["alive"] > lost_since:
                    attempt["lost"] = round(attempt["alive"] - lost_since, 3)
            self.totals()
        except (CheckpointError, LookupError, TypeError, AttributeError, RecursionError) as error:
            self._earlier = []
            if processes.is_main():
                files.set_aside(self._file, error)

    def write(self, step: int, ended: bool = False) -> None:
        """Updates the file. ended: the run has saved and stops, so nothing is lost."""
        self._clock.update()
        seconds = {n: round(s, 3) for n, s in self._clock.seconds.items()}
        alive = round(time.time(), 3)
        self._this |= {"ended": ended, "alive": alive, "step": step, "seconds": seconds}
        if processes.is_main():
            with files.replacing(self._file, "tmp") as part:
                part.write_text(json.dumps([*self._earlier, self._this], indent=0))

    def totals(self) -> dict[str, float]:
        """Seconds in each phase over all attempts; `lost`: on steps that were computed again."""
        self._clock.update()
        attempts = [*self._earlier, {**self._this, "seconds": self._clock.seconds}]
        out: dict[str, float] = {n: sum(a["seconds"].get(n, 0.0) for a in attempts) for n in PHASES}
        lost = sum(a["lost"] for a in attempts)
        return {**out, "step": max(0.0, out["step"] - lost), "lost": lost}

    def values(self) -> dict[str, float]:
        """Metrics: `time/<phase>` in seconds, and `goodput`, the share of steps that counted."""
        totals = self.totals()
        goodput = totals["step"] / max(sum(totals.values()), 1e-9)
        return {"goodput": goodput, **{f"time/{n}": s for n, s in totals.items()}}

    def summary(self) -> str:
        """One line for the end of a run."""
        totals = self.totals()
        total = sum(totals.values())
        shares = ", ".join(f"{n} {s / total:.1%}" for n, s in totals.items())
        attempts = f" in {len(self._earlier) + 1} attempts" if self._earlier else ""
        return f"time: {metrics.duration(total)}{attempts}: {shares}"


class BadSteps:
    """`bad_steps.jsonl`: the rows of every step with a non-finite loss or gradient, or a spike of
    the gradient norm.

    The step itself skips the update (`training/step.py`).
    """

    def __init__(self, workdir: epath.PathLike, max_in_a_row: int, resume_step: int = 0):
        """
        Args:
          max_in_a_row: so many consecutive bad steps stop the run; 0: never.
          resume_step: lines of later steps are removed, because those steps come again.
        """
        self.limit_reached = False
        self._file, self._max = epath.Path(workdir) / BAD_STEPS_FILE, max_in_a_row
        self._in_a_row = 0
        self._last: dict[str, Any] = {}
        if processes.is_main() and self._file.exists():
            self._file.write_text(metrics.lines_up_to(self._file, resume_step))

    def count(self, step: int, out: Mapping[str, Any], report: loader.Report) -> None:
        """Args: out: metrics of the step: ok, loss, grad_norm, mean_grad_norm."""
        if out["ok"]:
            self._in_a_row = 0
            return
        reason = "non-finite loss or gradient"
        if math.isfinite(out["loss"]) and math.isfinite(out["grad_norm"]):
            norm, mean = float(out["grad_norm"]), float(out["mean_grad_norm"])
            reason = f"gradient norm {norm:.3g} is a spike above its mean {mean:.3g}"
        self._in_a_row += 1
        # For good: metrics come one step late, so a good step may already be running.
        self.limit_reached |= 0 < self._max <= self._in_a_row
        self._last = {
            "step": step,
            "first_row": report.first_row,
            "end_row": report.next_row,
            "reason": reason,
        }
        processes.log(
            f"step {step}: {reason}: update skipped; rows {report.first_row} to "
            f"{report.next_row - 1} added to {BAD_STEPS_FILE}"
        )
        if processes.is_main():
            lines = self._file.read_text() if self._file.exists() else ""
            self._file.write_text(lines + json.dumps(self._last) + "\n")  # a bucket cannot append

    def message(self) -> str:
        """Why the run stopped, and what to do."""
        rows = f"{self._last['first_row']}:{self._last['end_row']}"
        return (
            f"{self._max} steps in a row were skipped, up to step {self._last['step']} "
            f"({self._last['reason']}); the run is saved. To see which rows cause it, run the same "
            f"command with --replay={rows}. To continue, begin a branch at an earlier checkpoint "
            "(--branch-from=RUN@STEP) that leaves the rows of the bad steps out "
            f"(--config.data.skip_rows; {self._file} lists them) or has a lower optim.lr"
        )


class Watchdog:
    """Prints the stacks of all threads to stderr when no step ends within `seconds`.

    A context manager: after an error it stops, so that it does not end a notebook later.
    """

    def __init__(self, seconds: float, exit: bool = False):
        """Args: seconds: 0: off. exit: end the process too (with status 1)."""
        self._seconds, self._exit = seconds, exit
        self._running = False

    def __enter__(self) -> Watchdog:
        return self

    def __exit__(self, *_: Any) -> None:
        self.stop()

    def restart(self) -> None:
        """Begins to wait anew. First called after the first step, because compilation has no
        limit."""
        if self._seconds:
            self._running = True
            file = sys.__stderr__ or sys.stderr  # a notebook's stderr has no file descriptor
            faulthandler.dump_traceback_later(self._seconds, exit=self._exit, file=file)

    def stop(self) -> None:
        if self._running:
            self._running = False
            faulthandler.cancel_dump_traceback_later()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Around work between steps that may take long."""
        running = self._running
        self.stop()
        yield
        if running:
            self.restart()


class Trace:
    """Traces some steps with JAX's profiler into `workdir/profile`, one file for each host."""

    def __init__(self, workdir: epath.Path, steps: tuple[int, int] | None):
        """Args: steps: the first step, and the one after the last; None: no trace."""
        self._folder, self._steps = workdir / "profile", steps or (0, 0)
        self._running = False

    def begin_step(self, step: int, state: Any) -> None:
        """Starts or ends the trace. Call it before each step with the result of the last one."""
        first, end = self._steps
        if self._running and step >= end:
            self.end(state)
        elif first <= step < end and not self._running:
            jax.block_until_ready(state)
            jax.profiler.start_trace(self._folder)
            self._running = True

    def end(self, state: Any) -> None:
        """Waits for the last step and writes the trace."""
        if self._running:
            self._running = False
            jax.block_until_ready(state)
            jax.profiler.stop_trace()
            processes.log(f"trace written to {self._folder}")


class StopSignal:
    """Records SIGTERM (a cluster reclaims the machine) or Ctrl-C; a second one stops at once.

    A context manager, which listens from the first step on (`listen`): before it there is nothing
    to save, and the process ends as it would without this class. One process of a job is enough:
    the loop lets all of them agree (`processes.Agreement`).
    """

    def __init__(self) -> None:
        self.received = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignal:
        return self

    def listen(self) -> None:
        """Call it after each step; the first call installs the handlers."""
        if not self._before:
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._handle)

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: Any) -> None:
        if self.received:
            before = self._before[number]
            if callable(before):
                before(number, frame)
            raise KeyboardInterrupt
        self.received = True
        # print() is not safe here: the signal may arrive while its buffer is in use.
        os.write(1, b"stopping: saving a checkpoint at the next step\n")
