"""Timing of several ways to do one thing, in turn (A B A B), so that a noisy machine hits all."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax


class Timing(NamedTuple):
    """Seconds of one way."""

    first: float  # compilation and warming up included
    runs: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.runs)

    @property
    def spread(self) -> float:
        """(slowest - fastest) / median."""
        return (max(self.runs) - min(self.runs)) / self.median


def alternate(ways: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, Timing]:
    """Runs every way once unmeasured, then all of them `rounds` times in turn.

    Args: ways: name -> what is timed; results are waited for (JAX's arrays, CUDA's by the way
      itself).
    """
    first = {name: once(run) for name, run in ways.items()}
    runs: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, run in ways.items():
            runs[name].append(once(run))
    return {name: Timing(first[name], runs[name]) for name in ways}


def once(run: Callable[[], Any]) -> float:
    """Seconds until the result is there."""
    began = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - began
