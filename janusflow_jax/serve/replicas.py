"""Several engines of one process, one a local device, behind the interface of one."""

from __future__ import annotations

import concurrent.futures
import dataclasses
from collections.abc import Sequence
from typing import Any

import jax

from janusflow_jax.config.errors import JanusFlowError
from janusflow_jax.serve.engine import Engine
from janusflow_jax.serve.requests import (
    Draining,
    EngineSettings,
    EngineStatus,
    Histogram,
    OnEvent,
    QueueFull,
    Request,
)

_SUMMED = ("rows", "rows_used", "lanes", "lanes_used", "waiting_images", "waiting_chats")
_SUMMED += ("running_images", "running_chats")


def on_devices(model: Any, settings: EngineSettings, count: int = 1) -> Engine | Replicas:
    """An engine of a `Pipeline` on each of the first `count` local devices; 0: on all of them."""
    devices = jax.local_devices()
    if not 0 <= count <= len(devices):
        raise JanusFlowError(f"replicas: expected 0 (all) to {len(devices)}; got {count}")
    engines = [Engine(model, settings, device=d) for d in devices[: count or len(devices)]]
    return engines[0] if len(engines) == 1 else Replicas(engines)


class Replicas:
    """Gives each request to the engine with the least work; methods as of `Engine`."""

    def __init__(self, engines: Sequence[Engine]) -> None:
        self._engines = list(engines)
        self.settings, self.limits = engines[0].settings, engines[0].limits

    def start(self) -> None:
        for engine in self._engines:
            engine.start()

    def submit(self, request: Request, on_event: OnEvent) -> None:
        refused: list[QueueFull | Draining] = []
        for engine in sorted(self._engines, key=lambda x: x.seconds_left()):
            try:
                return engine.submit(request, on_event)
            except (QueueFull, Draining) as error:
                refused.append(error)
        raise min(refused, key=lambda x: getattr(x, "retry_after", float("inf")))

    def cancel(self, id: str) -> None:
        for engine in self._engines:
            engine.cancel(id)

    def drain(self, seconds: float) -> bool:
        with concurrent.futures.ThreadPoolExecutor(len(self._engines)) as pool:
            return all(list(pool.map(lambda engine: engine.drain(seconds), self._engines)))

    def close(self) -> None:
        for engine in self._engines:
            engine.close()

    def status(self) -> EngineStatus:
        """Of all: ready if one is, alive if all are; numbers are sums."""
        each = [engine.status() for engine in self._engines]
        counters = {n: sum(s.counters.get(n, 0) for s in each) for s in each for n in s.counters}
        counters["compilations"] = max(s.counters["compilations"] for s in each)  # of the process
        histograms = {
            n: Histogram(
                each[0].histograms[n].bounds,
                tuple(map(sum, zip(*(s.histograms[n].counts for s in each), strict=True))),
                sum(s.histograms[n].total for s in each),
            )
            for n in each[0].histograms
        }
        return dataclasses.replace(
            each[0],
            ready=any(s.ready for s in each),
            alive=all(s.alive for s in each),
            draining=any(s.draining for s in each),
            counters=counters,
            histograms=histograms,
            error="; ".join(s.error for s in each if s.error),
            **{n: sum(getattr(s, n) for s in each) for n in _SUMMED},
        )
