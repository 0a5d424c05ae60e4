"""Converts published checkpoints into a model folder. Needs no torch.

    # a released JanusFlow, and the SDXL-VAE in diffusers' form
    python tools/convert_checkpoint.py --janusflow DIR --vae DIR --out models/janusflow
    # the start of stage 1, from parts that can be downloaded
    python tools/convert_checkpoint.py --llm DIR --siglip DIR --vae DIR --out models/start

The folders hold safetensors (one file, or shards with an index), config.json and, for a language
model, the tokenizer's files. Everything is checked before anything is written, and an error lists
the tensors that do not fit.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports, which take seconds
    from janusflow_jax.config import signals

    signals.end_on_signals()

import argparse
import functools
import time
from typing import Any

from absl import logging

from janusflow_jax import cli, hub
from janusflow_jax.config import files


def parse(argv: list[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--janusflow", help="folder of a published JanusFlow")
    p.add_argument(
        "--llm", help="folder of a language model with its tokenizer (families: docs/open_parts.md)"
    )
    p.add_argument(
        "--siglip", help="folder of a SigLIP or SigLIP 2 (transformers, timm or open_clip)"
    )
    p.add_argument(
        "--vae", help="folder of SDXL's, SD 3's or FLUX's VAE; default: JANUSFLOW/vae if it exists"
    )
    p.add_argument("--out", required=True, help="the new model folder")
    p.add_argument(
        "--dtype",
        default="",
        choices=("bfloat16", "float32"),
        help="default: each tensor's own, so that an export returns every bit",
    )
    p.add_argument(
        "--gen-width", type=int, default=768, help="with --llm: width of the new ConvNeXt parts"
    )
    p.add_argument(
        "--image-size",
        type=int,
        default=0,
        help="with --llm: in pixels; default: the tower's own",
    )
    p.add_argument("--seed", type=int, default=0, help="with --llm: seed of the new parts")
    p.add_argument(
        "--overwrite", action="store_true", help="replace a folder that this command wrote"
    )
    args = p.parse_args(argv)
    if args.janusflow and not args.vae:
        vae = files.resolve(args.janusflow) / "vae"
        args.vae = str(vae) if vae.is_dir() else ""
    if bool(args.janusflow) == bool(args.llm or args.siglip):
        p.error("expected --janusflow DIR --vae DIR, or --llm DIR --siglip DIR --vae DIR")
    if args.janusflow and args.image_size:
        p.error("--image-size: expected with --llm only: a published model has its own")
    required = ("vae",) if args.janusflow else ("llm", "siglip", "vae")
    if missing := [f"--{n}" for n in required if not getattr(args, n)]:
        p.error(f"missing {', '.join(missing)}")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    logging.set_verbosity(logging.ERROR)  # Orbax logs every step of a save
    start = time.time()
    options: dict[str, Any] = {
        "dtype": args.dtype,
        "overwrite": args.overwrite,
        "log": functools.partial(print, flush=True),
    }
    if args.janusflow:
        hub.convert(args.janusflow, args.vae, args.out, **options)
    else:
        options |= {"gen_width": args.gen_width, "seed": args.seed}
        options["image_size"] = args.image_size
        hub.assemble(args.llm, args.siglip, args.vae, args.out, **options)
    print(f"saved to {args.out} after {time.time() - start:.1f} s")


if __name__ == "__main__":
    cli.run(main)
