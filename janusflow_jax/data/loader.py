"""Batches of rows, mapped and prefetched by grain's threads. The position is a row number.

grain sees ranges of row numbers and nothing else; its iterator's state is never saved.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Generator, Iterator, Sequence
from concurrent import futures
from typing import Any

import numpy as np
from absl import logging

from janusflow_jax import config as config_lib
from janusflow_jax.config.errors import DataError
from janusflow_jax.data import chat_format, rows as rows_lib

MIN_BAD = 20
"""So many bad samples are forgiven whatever their share."""


@dataclasses.dataclass
class Report:
    """What a batch holds: its own bad samples, and the run's counts so far (both of one process's
    rows)."""

    first_row: int
    next_row: int
    bad: list[rows_lib.BadSample]
    num_samples: int = 0
    num_bad: int = 0


@dataclasses.dataclass(frozen=True)
class _RowNumbers:
    """Numbers of the rows that one process makes, as grain's random-access source."""

    first_row: int
    batch_rows: int
    mine: Sequence[int]

    def __len__(self) -> int:
        return 2**40

    def __getitem__(self, index: int) -> int:
        batch, place = divmod(int(index), len(self.mine))
        return self.first_row + batch * self.batch_rows + self.mine[place]


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
        """Opens the mixture; see `rows.Rows` for `repa` and for what it raises."""
        self.cfg, self.batch_rows = cfg, batch_rows
        self.rows = rows_lib.Rows(cfg, model, chat, repa)

    def describe(self, phase: int = 0) -> list[dict[str, Any]]:
        """Per source: samples, bins, shares (see `rows.Rows.describe`)."""
        return self.rows.describe(phase)

    def summary(self) -> str:
        """A line a source and phase, for people."""
        lines = []
        for phase, (first_row, _) in enumerate(self.cfg.phases()):
            if first_row:
                lines.append(f"after step {first_row // self.batch_rows}:")
            for source in self.describe(phase):
                lines.append(
                    "{source} ({task}): {samples} samples of {records} records in {bins} bins, "
                    "{fill:.1%} of positions used, {share_of_positions:.1%} of the "
                    "mixture".format(**source)
                    + (f"; {source['left_out']} too long, left out" if source["left_out"] else "")
                )
        return "\n".join(lines)

    def batches(
        self,
        first_row: int,
        rows_of_process: Sequence[int] | None = None,
        counted: tuple[int, int] = (0, 0),
    ) -> Generator[tuple[dict[str, np.ndarray], Report], None, None]:
        """Batches of rows first_row, first_row + 1, ...; each batch is `batch_rows` further.

        Args:
          first_row: the run's saved position; 0 for a new run.
          rows_of_process: places in the batch (0 to batch_rows - 1) that this process makes;
            None for all.
          counted: samples and bad samples before; a resumed run goes on counting.
        Yields:
          (batch, report): arrays of `rows.Rows.row`, stacked; report.next_row is the position to
          save once the batch is done.
        Raises:
          DataError: more than cfg.max_bad_share of the samples, and more than MIN_BAD, are bad.
          DataError: the store cannot be read.
        """
        import grain

        mine = list(range(self.batch_rows) if rows_of_process is None else rows_of_process)
        wrong = [place for place in mine if not 0 <= place < self.batch_rows]
        if wrong or not mine:
            raise ValueError(
                f"rows_of_process: expected places below batch_rows {self.batch_rows}; got {mine}"
            )
        numbers = _RowNumbers(first_row, self.batch_rows, mine)
        threads = self.cfg.num_threads
        iterator = iter(
            grain.MapDataset.source(numbers)
            .map(self.rows.row)
            .to_iter_dataset(
                grain.ReadOptions(
                    num_threads=threads, prefetch_buffer_size=max(2 * len(mine), threads)
                )
            )
        )

        def make() -> tuple[dict[str, np.ndarray], list[rows_lib.BadSample]]:
            made = [next(iterator) for _ in mine]
            batch = {name: np.stack([row[name] for row, _ in made]) for name in made[0][0]}
            return batch, [b for _, found in made for b in found]

        num_samples, num_bad = counted
        pool = futures.ThreadPoolExecutor(1, "batch")  # stacks the next while this one is used
        coming = pool.submit(make)
        try:
            while True:
                batch, bad = coming.result()
                coming = pool.submit(make)
                num_bad += len(bad)
                num_samples += len(bad) + sum(_count(ids) for ids in batch["segment_ids"])
                for sample in bad:
                    logging.warning("bad sample: %s", sample)
                self._check(num_bad, num_samples, bad)
                first = first_row
                first_row += self.batch_rows
                yield batch, Report(first, first_row, bad, num_samples, num_bad)
        finally:
            pool.shutdown(cancel_futures=True)  # waits for the rows that are under way
            close = getattr(iterator, "close", None)
            if close is not None:
                close()

    def _check(self, num_bad: int, num_samples: int, bad: list[rows_lib.BadSample]) -> None:
        if num_bad <= MIN_BAD or num_bad <= self.cfg.max_bad_share * num_samples:
            return
        some = "\n".join(f"  {sample}" for sample in bad[:5])
        raise DataError(
            f"data: expected at most {self.cfg.max_bad_share:.1%} bad samples; got {num_bad} of "
            f"{num_samples}. The latest:\n{some}\nRepair the data set, or raise "
            "data.max_bad_share if you mean to train without them"
        )


class Ahead:
    """Batches, one of them made ahead, so that all processes can hear in time that one has none."""

    def __init__(self, batches: Iterator[tuple[dict[str, np.ndarray], Report]]):
        self.error: Exception | None = None
        self._batches = batches
        self._fetch()

    def take(self) -> tuple[dict[str, np.ndarray], Report]:
        """The next batch; the one after it is there, or the reason in `error`, on return."""
        batch = self._next
        self._fetch()
        return batch

    def _fetch(self) -> None:
        try:
            self._next = next(self._batches)
        except Exception as error:  # noqa: BLE001 - raised when all processes know
            self.error = error


def _count(segment_ids: np.ndarray) -> int:
    """Samples of a row: its segments."""
    return len(np.unique(segment_ids[segment_ids > 0]))
