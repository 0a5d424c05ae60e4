"""Running one function on many jobs: processes of this machine, or an Apache Beam pipeline.

A job is small and its result is in the shared store, so any engine that can map a function over a
list will do.
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
"""(function, jobs) -> the results as they come, in any order; None where the engine keeps them."""


def local(workers: int) -> Engine:
    """Processes of this machine; 1: this process."""

    def run(function: Callable[[T], Any], jobs: Sequence[T]) -> Iterator[Any]:
        if workers <= 1 or len(jobs) <= 1:
            for job in jobs:
                yield function(job)
            return
        # spawned: a fork of a process with threads (absl, array_record) can hang
        context = multiprocessing.get_context("spawn")
        pool = concurrent.futures.ProcessPoolExecutor(min(workers, len(jobs)), context)
        try:
            for done in concurrent.futures.as_completed([pool.submit(function, j) for j in jobs]):
                yield done.result()
        except concurrent.futures.process.BrokenProcessPool as e:
            raise DataError(
                "a worker process died (killed for memory?): the same command with fewer "
                "--workers goes on with what is not done"
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
            "engine beam: expected the package apache-beam; it is not installed: "
            "pip install apache-beam (with [gcp] for Dataflow)"
        ) from e

    def run(function: Callable[[T], Any], jobs: Sequence[T]) -> Iterator[Any]:
        if not jobs:
            return
        options = pipeline_options.PipelineOptions(list(arguments))
        with apache_beam.Pipeline(options=options) as pipeline:
            # Reshuffle: without it one worker would make and do all jobs
            _ = (
                pipeline
                | "jobs" >> apache_beam.Create(list(jobs))
                | "spread" >> apache_beam.Reshuffle()
                | "do" >> apache_beam.Map(function)
            )
        for _ in jobs:
            yield None

    return run


def ray(address: str) -> Engine:
    """Tasks of a Ray cluster.

    Args:
      address: of the cluster ('auto', 'ray://host:10001'), or 'local' for one of its own here.
    Raises:
      DataError: ray is not installed.
    """
    try:
        import ray as library  # pyright: ignore[reportMissingImports]
    except ImportError as e:
        raise DataError(
            "engine ray: expected the package ray; it is not installed: pip install ray"
        ) from e
    if not library.is_initialized():
        library.init(address, log_to_driver=False)

    def run(function: Callable[[T], Any], jobs: Sequence[T]) -> Iterator[Any]:
        task: Any = library.remote(function)
        waiting = [task.remote(job) for job in jobs]
        while waiting:
            done, waiting = library.wait(waiting, num_returns=1)
            yield library.get(done[0])

    return run
