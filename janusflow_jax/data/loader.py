"""Batches of rows, read ahead by threads. The data position is a row number and nothing else."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Generator, Iterator, Sequence

import numpy as np
from absl import logging

from janusflow_jax import config as config_lib
from janusflow_jax.config.errors import DataError
from janusflow_jax.data import chat_format, rows as rows_lib

MIN_BAD = 20
"""This many bad samples are tolerated, whatever their share."""
AHEAD = 2
"""Batches whose rows are read before they are needed."""

Batch = dict[str, np.ndarray]
Row = tuple[dict[str, np.ndarray], list[rows_lib.BadSample]]


@dataclasses.dataclass
class Report:
    """A batch's bad samples, and the run's counts so far; both of one process's rows."""

    first_row: int
    next_row: int
    bad: list[rows_lib.BadSample]
    num_samples: int = 0
    num_bad: int = 0


class Loader:
    """Endless batches from any row on."""

    def __init__(
        self,
        cfg: config_lib.DataConfig,
        model: config_lib.ModelConfig,
        chat: chat_format.ChatFormat,
        batch_rows: int,
        repa: bool = True,
    ):
        """Opens the mixture; see `rows.Rows` for `repa` and for the errors."""
        self.cfg, self.batch_rows = cfg, batch_rows
        self.rows = rows_lib.Rows(cfg, model, chat, repa)

    def summary(self) -> str:
        """A line for each source in each mixture."""
        lines = []
        for mixture in self.rows.mixtures:
            if mixture.first_row:
                position = self.cfg.position_of(mixture.first_row)
                lines.append(f"after step {position // self.batch_rows}:")
            lines.append(self.rows.summary(mixture))
        return "\n".join(lines)

    def batches(
        self,
        position: int,
        rows_of_process: Sequence[int] | None = None,
        counted: tuple[int, int] = (0, 0),
    ) -> Generator[tuple[Batch, Report], None, None]:
        """Batches of the rows at `position`, `position` + 1, ... (`DataConfig.row_at`).

        Args:
          position: where to begin: steps times `batch_rows`; 0 for a new run.
          rows_of_process: places in the batch (0 to batch_rows - 1) that this process reads;
            None for all.
          counted: samples and bad samples of the run so far.
        Yields:
          (batch, report): arrays of `rows.Rows.row`, stacked; report.next_row is the position to
          save once the batch is done.
        Raises:
          DataError: more than cfg.max_bad_share of the samples, and more than MIN_BAD, are bad, or
            the store cannot be read.
        """
        import grain

        places = list(range(self.batch_rows) if rows_of_process is None else rows_of_process)

        def read(index: int) -> Row:
            """Row of this process, counted from `position`."""
            batch, place = divmod(index, len(places))
            at = position + batch * self.batch_rows + places[place]
            return self.rows.row(self.cfg.row_at(at))

        options = grain.ReadOptions(
            num_threads=self.cfg.num_threads,
            prefetch_buffer_size=max(AHEAD * len(places), self.cfg.num_threads),
        )
        rows = grain.MapDataset.range(sys.maxsize // self.batch_rows).map(read)
        batches = rows.to_iter_dataset(options).batch(len(places), batch_fn=_stack)
        num_samples, num_bad = counted
        for batch_number, (batch, bad) in enumerate(batches):
            num_bad += len(bad)
            num_samples += len(bad) + sum(_num_segments(ids) for ids in batch["segment_ids"])
            for sample in bad:
                logging.warning("bad sample: %s", sample)
            self._check(num_bad, num_samples, bad)
            first = position + batch_number * self.batch_rows
            last = first + self.batch_rows - 1
            rows_read = self.cfg.row_at(first), self.cfg.row_at(last) + 1
            yield batch, Report(*rows_read, bad, num_samples, num_bad)

    def _check(self, num_bad: int, num_samples: int, bad: list[rows_lib.BadSample]) -> None:
        if num_bad <= MIN_BAD or num_bad <= self.cfg.max_bad_share * num_samples:
            return
        latest = "\n".join(f"  {sample}" for sample in bad[:5])
        raise DataError(
            f"data: expected at most {self.cfg.max_bad_share:.1%} bad samples; got {num_bad} of "
            f"{num_samples}. The latest:\n{latest}\nRepair the data set, or raise "
            "data.max_bad_share to train without them"
        )


class Ahead:
    """Batches, of which the next is always there already.

    So a process knows before it begins a step that it has no next batch, in time for the others to
    learn of it. `error` is the reason.
    """

    def __init__(self, batches: Iterator[tuple[Batch, Report]]):
        self.error: Exception | None = None
        self._batches = batches
        self._fetch()

    def __next__(self) -> tuple[Batch, Report]:
        batch = self._next
        self._fetch()
        return batch

    def _fetch(self) -> None:
        try:
            self._next = next(self._batches)
        except Exception as error:  # noqa: BLE001 - raised when all processes know
            self.error = error


def _stack(rows: Sequence[Row]) -> tuple[Batch, list[rows_lib.BadSample]]:
    """Rows as one batch, and their bad samples."""
    batch = {name: np.stack([row[name] for row, _ in rows]) for name in rows[0][0]}
    return batch, [sample for _, bad in rows for sample in bad]


def _num_segments(segment_ids: np.ndarray) -> int:
    """Samples of a row."""
    return len(np.unique(segment_ids[segment_ids > 0]))
