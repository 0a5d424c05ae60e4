"""Products of float32 matrices from bfloat16 operands on CPU, forward and backward, by shape.

    python -m benchmarks.products

The shapes are those of the quick start's step. Prints median milliseconds of the two ways, run in
turn, their ratio, and the operations of both passes per second.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import timing
from janusflow_jax.models import products

SHAPES = {
    "LLM, queries": ((1280, 192), (192, 192)),
    "LLM, MLP up": ((1280, 192), (192, 512)),
    "LLM, MLP down": ((1280, 512), (512, 192)),
    "decoder, first": ((640, 384), (384, 1536)),
    "decoder, second": ((640, 1536), (1536, 384)),
    "attention, values": ((8, 6, 160, 160), (8, 6, 160, 32)),
}


def gradients(product: Callable[[Any, Any], Any], a: Any, b: Any) -> Callable[[], Any]:
    """Runs the product and its two gradients."""

    def run(a: Any, b: Any, g: Any) -> Any:
        out, pull = jax.vjp(product, a, b)
        return out, pull(g)

    compiled, g = jax.jit(run), jnp.matmul(a, b)
    return lambda: compiled(a, b, g)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--rounds", type=int, default=30)
    args = p.parse_args()
    print("| product | float32, ms | rounded, ms | ratio | rounded, GFLOP/s |")
    print("| --- | --- | --- | --- | --- |")
    for name, (of_a, of_b) in SHAPES.items():
        a, b = (jax.random.normal(jax.random.key(len(s)), s) for s in (of_a, of_b))
        ways = {"float32": gradients(jnp.matmul, a, b), "rounded": gradients(products.matmul, a, b)}
        times = timing.alternate(ways, args.rounds)
        plain, rounded = (1000 * times[way].median for way in ways)
        work = 6 * a.size * of_b[-1] / 1e6
        print(
            f"| {name}, {list(of_a)} x {list(of_b)} | {plain:.2f} | {rounded:.2f} | "
            f"{plain / rounded:.2f} | {work / rounded:.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
