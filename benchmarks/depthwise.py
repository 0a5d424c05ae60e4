"""The two forms of the depthwise convolution on CPU, forward and backward, by grid.

    python -m benchmarks.depthwise

It decides `convnext.SMALL_GRID`. Prints the CPU time and the time of the median run, and the
greatest difference between the two forms relative to the greatest value.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp

from janusflow_jax.models import convnext

GRIDS = (4, 6, 8, 10, 12)
FORMS = {"shifts": convnext.shifts, "matmul": convnext.grid_matmul}


def measure(run: Callable[[], object], rounds: int) -> tuple[float, float]:
    """Median milliseconds of a run: of the processor, and of the clock."""
    jax.block_until_ready(run())
    cpu, wall = [], []
    for _ in range(rounds):
        began, began_cpu = time.perf_counter(), time.process_time()
        jax.block_until_ready(run())
        wall.append(1000 * (time.perf_counter() - began))
        cpu.append(1000 * (time.process_time() - began_cpu))
    return statistics.median(cpu), statistics.median(wall)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--images", type=int, default=40)
    p.add_argument("--channels", type=int, default=192)
    p.add_argument("--rounds", type=int, default=20)
    args = p.parse_args()
    print("| grid | shifts, CPU (clock), ms | matmul | difference |\n| --- | --- | --- | --- |")
    for size in GRIDS:
        a, b = jax.random.split(jax.random.key(size))
        x = jax.random.normal(a, (args.images, size, size, args.channels))
        kernel = 0.1 * jax.random.normal(b, (convnext.KERNEL, convnext.KERNEL, 1, args.channels))
        cells, results = [f"{size} x {size}"], []
        for form in FORMS.values():
            loss = lambda x, k, form=form: jnp.sum(jnp.sin(form(x, k)))  # noqa: E731
            gradients = jax.jit(jax.grad(loss, (0, 1)))
            results.append(gradients(x, kernel))
            cpu, wall = measure(lambda run=gradients, x=x, k=kernel: run(x, k), args.rounds)
            cells.append(f"{cpu:.1f} ({wall:.1f})")
        pairs = zip(*results, strict=True)
        difference = max(float(jnp.abs(a - b).max() / jnp.abs(a).max()) for a, b in pairs)
        print("| " + " | ".join([*cells, f"{difference:.0e}"]) + " |", flush=True)


if __name__ == "__main__":
    main()
