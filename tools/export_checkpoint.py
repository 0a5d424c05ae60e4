"""A model folder or a training run -> the published (Hugging Face) layout, with a model card.

    python tools/export_checkpoint.py --model models/janusflow --out exported
    python tools/export_checkpoint.py --model runs/stage3 --weights ema --dtype bfloat16 --out mine

    python tools/export_checkpoint.py --model runs/finetune --adapter-only --out adapter

A converted model comes back bit for bit. What the published format has no word for is an error.
"""

from __future__ import annotations

import argparse
import signal
import sys

from absl import logging

from janusflow_jax import cli
from janusflow_jax.hub import adapters, export as hub_export


def main(argv: list[str] | None = None) -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--model", required=True, help="model folder, training run, or a checkpoint")
    p.add_argument("--out", required=True, help="folder to make")
    p.add_argument("--weights", default="ema", choices=("ema", "params"))
    p.add_argument(
        "--dtype",
        default="",
        choices=("bfloat16", "float32"),
        help="default: the types that the converted files had, else the arrays' own",
    )
    p.add_argument("--license", default="", help="for the card, where no source names its own")
    p.add_argument("--shard-gb", type=float, default=5.0, help="largest file of weights")
    p.add_argument("--overwrite", action="store_true")
    p.add_argument(
        "--adapter-only",
        action="store_true",
        help="a LoRA run's adapters alone, in PEFT's layout (without it they are merged)",
    )
    args = p.parse_args(argv)
    logging.set_verbosity(logging.ERROR)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that half a folder is removed
    if args.adapter_only:
        if args.dtype or args.license or args.overwrite:
            p.error("--adapter-only: expected no --dtype, --license or --overwrite beside it")
        print(adapters.save(args.model, args.out, weights=args.weights))
        return
    hub_export.export(
        args.model,
        args.out,
        weights=args.weights,
        dtype=args.dtype,
        licence=args.license,
        shard_bytes=int(args.shard_gb * 1e9),
        overwrite=args.overwrite,
    )


if __name__ == "__main__":
    cli.run(main)
