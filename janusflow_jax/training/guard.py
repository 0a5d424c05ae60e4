"""Steps whose loss or gradient is no number: counted, kept for replay, and a run stopped in time.

The step itself has skipped the update (`train_step`); here is what the loop does about it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from janusflow_jax.config.errors import ConfigError
from janusflow_jax.data import loader
from janusflow_jax.parallel import processes
from janusflow_jax.training import metrics

FILE = "bad_steps.jsonl"


class Guard:
    """Counts bad steps; a line of `bad_steps.jsonl` for each."""

    def __init__(self, workdir: epath.PathLike, most: int, resume_step: int = 0):
        """Args: most: bad steps in a row that stop the run; 0: never. resume_step: lines past it
        are dropped, those steps come again."""
        self.in_a_row, self.tripped = 0, False
        self._file, self._most = epath.Path(workdir) / FILE, most
        self._last: tuple[int, int, int] | None = None
        if processes.is_main() and self._file.exists():
            self._file.write_text(metrics.kept_lines(self._file.read_text(), resume_step))

    def count(self, step: int, ok: bool, report: loader.Report) -> None:
        """Takes note of a step."""
        if ok:
            self.in_a_row = 0
            return
        self.in_a_row += 1
        self.tripped |= 0 < self._most <= self.in_a_row  # for good: one step more is under way
        self._last = (step, report.first_row, report.next_row)
        processes.log(
            f"step {step}: non-finite loss or gradient, update skipped; rows {report.first_row} "
            f"to {report.next_row - 1} noted in {FILE}"
        )
        if processes.is_main():
            lines = self._file.read_text() if self._file.exists() else ""
            line = {"step": step, "first_row": report.first_row, "end_row": report.next_row}
            self._file.write_text(lines + json.dumps(line) + "\n")  # a bucket cannot append

    def message(self) -> str:
        """What a stopped run says."""
        step, first, end = self._last or (0, 0, 0)
        return (
            f"{self._most} steps in a row or more, the last of them {step}, had a non-finite loss "
            "or gradient; their updates were skipped and the run is saved. To see which rows do "
            f"it, run the same command with --replay={first}:{end}; to go on, lower optim.lr in a "
            "new run that starts from this one (--config.start), or take the rows' records out of "
            f"the data. {self._file} lists all bad steps"
        )


def parse_rows(text: str) -> tuple[int, int]:
    """'12' -> (12, 13), '12:20' -> (12, 20).

    Raises:
      ConfigError: anything else.
    """
    first, colon, end = text.partition(":")
    if first.isdecimal() and (end.isdecimal() if colon else True):
        found = int(first), int(end) if colon else int(first) + 1
        if found[0] < found[1]:
            return found
    raise ConfigError(f"--replay: expected ROW or FIRST:END, such as 1024:1536; got {text!r}")


def describe(
    row: int, records: tuple[str, list[int]], values: Mapping[str, float], bad: Sequence[Any]
) -> str:
    """A row's losses, and where a gradient is no number the parts that it is in."""
    source, numbers = records
    losses = [f"{n} {values[f'loss_{n}']:.4f}" for n in ("ar", "rf", "repa")]
    lines = [f"row {row}: {'  '.join(losses)}  gradient {values['grad_norm']:.4g}  {source}"]
    lines.append(f"  records {', '.join(map(str, numbers))}")
    lines += [f"  left out: {sample}" for sample in bad]
    odd = [n for n, v in values.items() if not math.isfinite(v)]
    if odd:
        lines.append(f"  NOT FINITE: {', '.join(odd)}")
    return "\n".join(lines)
