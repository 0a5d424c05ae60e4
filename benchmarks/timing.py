"""Times several implementations in turn (A B A B), so that a noisy machine affects all alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax


class Timing(NamedTuple):
    """Seconds of one implementation."""

    first: float  # with compilation and warm-up
    runs: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.runs)

    @property
    def spread(self) -> float:
        """(slowest - fastest) / median."""
        return (max(self.runs) - min(self.runs)) / self.median


def alternate(implementations: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, Timing]:
    """Runs each implementation once without measuring, then all of them `rounds` times in turn.

    Args: implementations: by name. JAX's results are waited for; PyTorch code must wait itself.
    """
    first = {name: seconds(run) for name, run in implementations.items()}
    rest = [{n: seconds(run) for n, run in implementations.items()} for _ in range(rounds)]
    return {name: Timing(first[name], [r[name] for r in rest]) for name in implementations}


def seconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - start
