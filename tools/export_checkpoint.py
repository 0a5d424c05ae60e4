"""Exports a model folder or a training run to the published (Hugging Face) layout.

    python tools/export_checkpoint.py --model models/janusflow --out exported
    python tools/export_checkpoint.py --model runs/stage3 --weights ema --dtype bfloat16 --out mine
    python tools/export_checkpoint.py --model runs/finetune --adapter-only --out adapter

A converted model comes back bit for bit. A model that the published layout cannot
describe is written in parts, which transformers, diffusers and convert_checkpoint.py read.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports, which take seconds
    from janusflow_jax.config import signals

    signals.end_on_signals()

import argparse

from absl import logging

from janusflow_jax import cli, hub


def main(argv: list[str] | None = None) -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--model", required=True, help="model folder, training run, or a checkpoint")
    p.add_argument("--out", required=True, help="the new folder")
    p.add_argument("--weights", default="ema", choices=("ema", "params"))
    p.add_argument(
        "--dtype",
        default="",
        choices=("bfloat16", "float32"),
        help="default: that of the converted files, else of the arrays",
    )
    p.add_argument("--license", default="", help="for the model card; default: the sources'")
    p.add_argument("--shard-gb", type=float, default=5.0, help="size of the largest weights file")
    p.add_argument(
        "--overwrite", action="store_true", help="replace a folder that this command wrote"
    )
    p.add_argument(
        "--adapter-only",
        action="store_true",
        help="only a LoRA run's adapters, in PEFT's layout (otherwise they are merged)",
    )
    args = p.parse_args(argv)
    logging.set_verbosity(logging.ERROR)
    if args.adapter_only:
        if args.dtype or args.license or args.overwrite:
            p.error("--adapter-only: expected no --dtype, --license or --overwrite")
        print(hub.save_adapter(args.model, args.out, weights=args.weights))
        return
    hub.export(
        args.model,
        args.out,
        weights=args.weights,
        dtype=args.dtype,
        license=args.license,
        shard_bytes=int(args.shard_gb * 1e9),
        overwrite=args.overwrite,
    )


if __name__ == "__main__":
    cli.run(main)
