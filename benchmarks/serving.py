"""Throughput and latency of an engine against one request at a time: `benchmarks/serving.py`.

The same Poisson arrivals of image requests go through the same programs in three ways: one request
after the other, all together in order of arrival, and as the engine is (least work first, fair,
with aging). The clock is the CPU time of the process, so that other programs on the machine do not
count (bind it to one core); where nothing waits it jumps to the next arrival. Random weights.
"""

from __future__ import annotations

import argparse
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import models
import numpy as np

import janusflow_jax
from janusflow_jax.config import SamplerConfig
from janusflow_jax.parallel import numerics
from janusflow_jax.serve import engine as engine_lib, order
from janusflow_jax.serve.requests import EngineSettings, Finished, ImageRequest

COUNTS, COUNT_SHARES = (1, 4, 10), (0.7, 0.2, 0.1)
STEPS, STEP_SHARES = (10, 30, 50), (0.1, 0.6, 0.3)
GUIDED = 0.9
PROMPT = "a red apple"
WAYS = ("one request at a time", "steps, in order of arrival", "steps, least work first")


class Arrival(NamedTuple):
    seconds: float
    count: int
    steps: int
    scale: float


class Clock:
    """CPU seconds of the process; idle time is skipped."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        self._skipped = -time.process_time()

    def __call__(self) -> float:
        return time.process_time() + self._skipped

    def skip_to(self, seconds: float) -> None:
        self._skipped += max(seconds - self(), 0.0)


def traffic(number: int, seed: int, steps_of: Sequence[int]) -> list[Arrival]:
    """Requests of one mean arrival a second."""
    draw = np.random.default_rng(seed)
    at = np.cumsum(draw.exponential(size=number))
    counts = draw.choice(COUNTS, number, p=COUNT_SHARES)
    steps = draw.choice(steps_of, number, p=STEP_SHARES)
    scales = np.where(draw.random(number) < GUIDED, 2.0, 1.0)
    return [Arrival(*x) for x in zip(at, counts.tolist(), steps.tolist(), scales, strict=True)]


def serve(engine: Any, clock: Clock, arrivals: list[Arrival], most: int) -> list[float]:
    """Seconds from arrival to the last image of every request; `most` are in the engine at once."""
    latencies: dict[int, float] = {}

    def listener(number: int) -> Callable[[Any], None]:
        def heard(event: Any) -> None:
            if isinstance(event, Finished):
                latencies[number] = clock() - arrivals[number].seconds

        return heard

    number = 0
    with numerics.fixed():
        while len(latencies) < len(arrivals):
            while number < min(len(arrivals), len(latencies) + most):
                x = arrivals[number]
                if x.seconds > clock():
                    break
                request = ImageRequest(
                    id=str(number),
                    client=str(number),
                    prompt=PROMPT,
                    seeds=tuple(range(x.count)),
                    guidance_scale=float(x.scale),
                    sampler=SamplerConfig(steps=x.steps),
                )
                engine.submit(request, listener(number))
                number += 1
            if not engine.turn() and number < len(arrivals):
                clock.skip_to(arrivals[number].seconds)
    return [latencies[i] for i in range(len(arrivals))]


def quantile(values: list[float], share: float) -> float:
    return sorted(values)[int(share * len(values))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", default="emoji")
    parser.add_argument("--scratch", help="where the model is made; a temporary folder")
    parser.add_argument("--steps", type=int, nargs=3, default=STEPS)
    parser.add_argument("--requests", type=int, default=300)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--loads", type=float, nargs="+", default=[0.5, 0.8])
    args = parser.parse_args()
    scratch = pathlib.Path(args.scratch or tempfile.mkdtemp())
    model = janusflow_jax.load(models.folders(scratch, args.size, peers=False)[0])
    settings = EngineSettings(
        rows=args.rows, lanes=1, context=64, prompt_tokens=32, queue=10**6, queue_per_client=10**6
    )
    clock = Clock()
    engine = engine_lib.Engine(model, settings, clock=clock)
    with numerics.fixed():
        engine.warm_up()
    # The speed of one request at a time; the loads are shares of it.
    sample = [x._replace(seconds=0.0) for x in traffic(-(-args.requests // 3), 1, args.steps)]
    clock.restart()
    serve(engine, clock, sample, most=1)
    mean = clock() / len(sample)
    print(f"{args.size}: one request takes {mean:.3f} s on average, alone; {args.rows} rows")
    for count in engine._programs.row_counts:
        places, numbers = np.zeros((5, count), np.int32), np.zeros((5, count), np.float32)
        places[:3] = np.arange(count)
        with numerics.fixed():
            clock.restart()
            for _ in range(10):
                engine._programs.read(engine._programs.step(places, numbers))
        print(f"  a step of {count} rows: {clock() / 10 * 1000:.1f} ms")
    print("| load | way | all p50 | one image p50 | one image p95 | ten images p95 | requests/s |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    in_order: Any = lambda self, waiting, now: sorted(waiting, key=lambda x: x.since)  # noqa: E731
    least_first = order.Order.sorted
    for load in args.loads:
        unit = traffic(args.requests, 2, args.steps)
        arrivals = [x._replace(seconds=x.seconds * mean / load) for x in unit]
        for way in WAYS:
            order.Order.sorted = in_order if way == WAYS[1] else least_first
            clock.restart()
            most = 1 if way == WAYS[0] else len(arrivals)
            latencies = serve(engine, clock, arrivals, most)
            one = [t for t, x in zip(latencies, arrivals, strict=True) if x.count == 1]
            ten = [t for t, x in zip(latencies, arrivals, strict=True) if x.count == 10]
            end = max(t + x.seconds for t, x in zip(latencies, arrivals, strict=True))
            print(
                f"| {load} | {way} | {statistics.median(latencies):.2f} | "
                f"{statistics.median(one):.2f} | {quantile(one, 0.95):.2f} | "
                f"{quantile(ten, 0.95):.2f} | {len(arrivals) / end:.3g} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
