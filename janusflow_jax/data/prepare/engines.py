"""Where shards run: processes of this machine, an Apache Beam pipeline, or a Ray cluster.

A job is small and its result is in files that every worker sees, so an engine only has to map a
function over a list.
"""

from __future__ import annotations

import concurrent.futures
import concurrent.futures.process
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from janusflow_jax.config.errors import DataError

T = TypeVar("T")
Engine = Callable[[Callable[[T], Any], Sequence[T]], Iterator[Any]]
"""(function, jobs) -> the results in any order; None where the engine does not return them."""


def local(workers: int) -> Engine:
    """Processes of this machine; with 1, this process."""

    def run(function: Callable[[T], Any], jobs: Sequence[T]) -> Iterator[Any]:
        if workers <= 1 or len(jobs) <= 1:
            yield from map(function, jobs)
            return
        # spawned: a fork of a process with threads (absl, array_record) can hang
        context = multiprocessing.get_context("spawn")
        pool = concurrent.futures.ProcessPoolExecutor(min(workers, len(jobs)), context)
        try:
            futures = [pool.submit(function, job) for job in jobs]
            for future in concurrent.futures.as_completed(futures):
                yield future.result()
        except concurrent.futures.process.BrokenProcessPool as e:
            raise DataError(
                "a worker process died (out of memory?): run again with fewer `workers` to resume"
            ) from e
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    return run


def beam(arguments: Sequence[str]) -> Engine:
    """A Beam pipeline; Beam's own options say where it runs (the direct runner by default).

    Args:
      arguments: Beam's options, such as --runner=DataflowRunner.
    Raises:
      DataError: apache_beam is not installed.
    """
    try:
        import apache_beam  # pyright: ignore[reportMissingImports]
        from apache_beam.options import pipeline_options  # pyright: ignore[reportMissingImports]
    except ImportError as e:
        raise DataError(
            "engine beam: expected the package apache-beam; it is not installed: run "
            "`pip install apache-beam` (apache-beam[gcp] for Dataflow)"
        ) from e

    def run(function: Callable[[T], Any], jobs: Sequence[T]) -> Iterator[Any]:
        if not jobs:
            return
        options = pipeline_options.PipelineOptions(list(arguments))
        with apache_beam.Pipeline(options=options) as pipeline:
            # without Reshuffle, Beam fuses the steps and one worker does all jobs
            _ = (
                pipeline
                | "jobs" >> apache_beam.Create(list(jobs))
                | "spread" >> apache_beam.Reshuffle()
                | "run" >> apache_beam.Map(function)
            )
        for _ in jobs:
            yield None

    return run


def ray(address: str) -> Engine:
    """Tasks of a Ray cluster.

    Args:
      address: of the cluster ('auto', 'ray://host:10001'), or 'local' to start one here.
    Raises:
      DataError: ray is not installed.
    """
    try:
        import ray as library  # pyright: ignore[reportMissingImports]
    except ImportError as e:
        raise DataError(
            "engine ray: expected the package ray; it is not installed: run `pip install ray`"
        ) from e
    if not library.is_initialized():
        library.init(address, log_to_driver=False)

    def run(function: Callable[[T], Any], jobs: Sequence[T]) -> Iterator[Any]:
        task: Any = library.remote(function)
        pending = [task.remote(job) for job in jobs]
        while pending:
            done, pending = library.wait(pending, num_returns=1)
            yield library.get(done[0])

    return run
