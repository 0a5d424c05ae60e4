"""Compares our speed with PyTorch's on the same weights: `python -m benchmarks.run`.

    python -m benchmarks.run --size small --scratch /tmp/bench                # 2 CPU cores, ~15 min
    python -m benchmarks.run --size 1p3b --scratch /tmp/bench --dtype bfloat16 --steps 30  # a GPU
    python -m benchmarks.run --only generate,chat --rounds 5 --json out.json

Creates a random model of the size (once, in the scratch folder). Then times our implementation and
its PyTorch peers (benchmarks/torch_peer.py) in turn (A B A B) for every case; prints medians and
spreads. The peers use the same weights: as published, with the prompt cached, and, with --compile,
with torch.compile. They need the extra `dev`; --no-peers leaves them out. Where a ratio is above 1,
ours is faster. Conversion and data loading have their own scripts: conversion.py and loading.py.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import os
import pathlib
import platform
import sys

import jax

from benchmarks import cases, models


def settings(args: argparse.Namespace) -> dict[str, object]:
    """Everything that the figures depend on."""
    device = jax.devices()[0]
    versions = {n: importlib.metadata.version(n) for n in ("jax", "flax")}
    if not args.no_peers:
        versions |= {n: importlib.metadata.version(n) for n in ("torch", "transformers")}
    return {
        "size": args.size,
        "dtype": args.dtype,
        "rounds": args.rounds,
        "steps": args.steps,
        "device": f"{device.platform} {device.device_kind}",
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        **versions,
    }


def line(result: cases.Result) -> str:
    """A result as one line."""
    timing = result.ways["ours"]
    ours = timing.median
    rate = result.units / ours
    fields = [f"{result.case:48} {ours:8.3f} s  {rate:8.3g} {result.unit}/s"]
    if result.tflop:
        fields.append(f"{result.tflop / ours:7.3g} useful TFLOP/s")
    if result.gbytes:
        fields.append(f"{result.gbytes / ours:.3g} GB/s")
    fields.append(f"spread {timing.spread:.0%}, first {timing.first:.1f} s")
    fields += [
        f"| {name}: {t.median:.3f} s (spread {t.spread:.0%}), ratio {t.median / ours:.2f}"
        for name, t in result.ways.items()
        if name != "ours"
    ]
    return "  ".join(fields + ([f"| {result.note}"] if result.note else []))


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--size", default="small", help="test | small | 1p3b, or emoji: --no-peers")
    p.add_argument("--scratch", default="/tmp/janusflow-bench", help="folder for random models")
    p.add_argument("--only", default=",".join(cases.CASES), help="cases, comma-separated")
    p.add_argument("--rounds", type=int, default=3, help="per implementation, after a first run")
    p.add_argument("--dtype", default="", help="float32 | bfloat16; default: the device's")
    p.add_argument("--steps", type=int, default=0, help="Euler steps; default: 8 on CPU, else 30")
    p.add_argument("--new-tokens", type=int, default=64, help="tokens of an answer")
    p.add_argument("--max-batch", type=int, default=0, help="default: 2 on CPU, else 16")
    p.add_argument("--compile", action="store_true", help="torch.compile as one more peer")
    p.add_argument("--no-peers", action="store_true", help="ours alone (no torch needed)")
    p.add_argument("--json", default="", help="file to write the figures to")
    args = p.parse_args()
    on_cpu = jax.default_backend() == "cpu"
    args.dtype = args.dtype or ("float32" if on_cpu else "bfloat16")
    args.steps = args.steps or (8 if on_cpu else 30)
    names = [n.strip() for n in args.only.split(",") if n.strip()]
    if unknown := sorted(set(names) - set(cases.CASES)):
        sys.exit(f"error: --only: expected some of {', '.join(cases.CASES)}; got {unknown}")
    scratch = pathlib.Path(args.scratch)
    scratch.mkdir(parents=True, exist_ok=True)
    ours, published = models.folders(scratch, args.size, not args.no_peers)
    setup = cases.Setup(
        args.size,
        ours,
        published,
        args.dtype,
        args.rounds,
        args.steps,
        args.new_tokens,
        args.max_batch or (2 if on_cpu else 16),
        args.compile,
        not args.no_peers,
    )
    used = settings(args)
    print(", ".join(f"{k} {v}" for k, v in used.items()), flush=True)
    results = []
    for name in names:
        for result in cases.CASES[name](setup):
            print(line(result), flush=True)
            times = {n: t._asdict() for n, t in result.ways.items()}
            results.append({**dataclasses.asdict(result), "ways": times})
    if args.json:
        text = json.dumps({"settings": used, "results": results}, indent=1)
        pathlib.Path(args.json).write_text(text)


if __name__ == "__main__":
    main()
