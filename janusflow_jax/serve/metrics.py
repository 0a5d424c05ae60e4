"""Numbers for Prometheus: what the HTTP side counts, and the engine's status."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import prometheus_client
from prometheus_client import core, registry

from janusflow_jax.serve.checks import ServedModel

MEDIA_TYPE = prometheus_client.CONTENT_TYPE_LATEST
ROUTES = (
    "/v1/models",
    "/v1/images/generations",
    "/v1/images/edits",
    "/v1/chat/completions",
    "/health",
    "/ready",
    "/metrics",
)
SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)


class Metrics:
    """A registry of its own for each server, so that tests and replicas may have several."""

    def __init__(self, engine: Any, model: ServedModel):
        self.registry = prometheus_client.CollectorRegistry()
        self.registry.register(_EngineCollector(engine))
        self.requests = prometheus_client.Counter(
            "janusflow_requests",
            "Answered requests; 499: the client left before the answer began",
            ["route", "code"],
            registry=self.registry,
        )
        self.seconds = prometheus_client.Histogram(
            "janusflow_request_seconds",
            "From a request's header to the end of its answer",
            ["route"],
            buckets=SECONDS,
            registry=self.registry,
        )
        prometheus_client.Info("janusflow_build", "The model", registry=self.registry).info(
            {"model": model.name, "fingerprint": model.fingerprint}
        )
        prometheus_client.ProcessCollector(registry=self.registry)

    def answered(self, path: str, status: int, seconds: float) -> None:
        route = path if path in ROUTES else "other"  # a client must not be able to add series
        self.requests.labels(route, str(status)).inc()
        self.seconds.labels(route).observe(seconds)

    def text(self) -> bytes:
        return prometheus_client.generate_latest(self.registry)


class _EngineCollector(registry.Collector):
    """The engine's status as metrics, named as vLLM's where they mean the same."""

    def __init__(self, engine: Any):
        self.engine = engine

    def collect(self) -> Iterator[core.Metric]:
        status = self.engine.status()
        for name in ("running", "waiting"):
            gauge = core.GaugeMetricFamily(
                f"janusflow_requests_{name}", f"Images and chats that are {name}", labels=["kind"]
            )
            for kind in ("image", "chat"):
                gauge.add_metric([kind], getattr(status, f"{name}_{kind}s"))
            yield gauge
        for name in ("rows", "rows_used", "lanes", "lanes_used"):
            text = "Branches of images" if name.startswith("rows") else "Conversations"
            yield core.GaugeMetricFamily(
                f"janusflow_{name}", f"{text} at once", value=getattr(status, name)
            )
        for name in ("ready", "alive"):
            yield core.GaugeMetricFamily(
                f"janusflow_{name}", "1: yes", value=int(getattr(status, name))
            )
        for name, value in sorted(status.counters.items()):
            yield core.CounterMetricFamily(f"janusflow_{name}", f"Number of {name}", value=value)
        for name, histogram in sorted(status.histograms.items()):
            buckets = ["+Inf" if math.isinf(x) else str(float(x)) for x in histogram.bounds]
            yield core.HistogramMetricFamily(
                f"janusflow_{name}_seconds",
                f"Seconds of {name}",
                buckets=list(zip(buckets, histogram.counts, strict=True)),
                sum_value=histogram.total,
            )
