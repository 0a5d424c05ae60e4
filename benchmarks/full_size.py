"""A converted checkpoint of the released size on this machine: load, one token, one image.

    python benchmarks/conversion.py --scratch /tmp/conversion          # creates the random folders
    python tools/convert_checkpoint.py --janusflow /tmp/conversion/janusflow \\
        --vae /tmp/conversion/vae --out /tmp/conversion/full
    python benchmarks/full_size.py --model /tmp/conversion/full

Prints the seconds of each step (with compilation, then without) and the peak resident memory of the
process.
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

import janusflow_jax


def timed(name: str, run: Callable[[], Any]) -> Any:
    start = time.perf_counter()
    out = jax.block_until_ready(run())
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{name:44} {seconds:7.1f} s   peak {peak:5.2f} GiB", flush=True)
    return out


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--model", required=True, help="model folder")
    p.add_argument("--dtype", default=None, help="float32 | bfloat16; default: the device's")
    args = p.parse_args()
    model = timed("load", lambda: janusflow_jax.load(args.model, dtype=args.dtype))
    count = sum(x.size for x in jax.tree.leaves((model.params, model.vae)))
    print(f"{count / 1e9:.3f} billion parameters, {model.dtype} on {jax.default_backend()}")
    image = np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8)

    def answer() -> str:
        return model.chat("What is this?", images=[image], max_new_tokens=1)

    def generate() -> np.ndarray:
        return model.generate("a red apple", num_steps=1, output="numpy")

    for again in ("", ", again"):
        timed(f"one token about an image{again}", answer)
        pixels = timed(f"one image, 1 step, guidance 2{again}", generate)
    print(f"image {pixels.shape}, mean {pixels.mean():.1f}, std {pixels.std():.1f}")


if __name__ == "__main__":
    main()
