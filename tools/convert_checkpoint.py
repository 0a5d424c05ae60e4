"""Published checkpoints -> a model folder. Needs no torch.

    # a released JanusFlow, and the SDXL-VAE in diffusers' form
    python tools/convert_checkpoint.py --janusflow DIR --vae DIR --out models/janusflow
    # the start of stage 1, from parts that people can download
    python tools/convert_checkpoint.py --llm DIR --siglip DIR --vae DIR --out models/start

Folders hold safetensors (one file, or shards with an index), config.json and, for a language model,
the tokenizer's files. Everything is checked before anything is written, and every problem is told.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from typing import Any

from absl import logging
from etils import epath

from janusflow_jax import cli
from janusflow_jax.hub import assemble as hub_assemble, import_janusflow as hub_import


def parse(argv: list[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--janusflow", help="folder of a published JanusFlow")
    p.add_argument("--llm", help="folder of a Llama with its tokenizer")
    p.add_argument("--siglip", help="folder of a SigLIP (transformers', timm's or open_clip's)")
    p.add_argument(
        "--vae", help="folder of an AutoencoderKL; default: JANUSFLOW/vae if it is there"
    )
    p.add_argument("--out", required=True, help="model folder to make")
    p.add_argument(
        "--dtype",
        default="",
        choices=("bfloat16", "float32"),
        help="default: each tensor's own; only then does an export give every bit back",
    )
    p.add_argument(
        "--gen-width", type=int, default=768, help="with --llm: of the new ConvNeXt parts"
    )
    p.add_argument("--seed", type=int, default=0, help="with --llm: of the new parts")
    p.add_argument("--overwrite", action="store_true")
    args = p.parse_args(argv)
    if args.janusflow and not args.vae and (epath.Path(args.janusflow) / "vae").is_dir():
        args.vae = str(epath.Path(args.janusflow) / "vae")
    if bool(args.janusflow) == bool(args.llm or args.siglip):
        p.error("expected --janusflow DIR --vae DIR, or --llm DIR --siglip DIR --vae DIR")
    missing = [n for n in ("llm", "siglip") if not args.janusflow and not getattr(args, n)]
    missing += [] if args.vae else ["vae"]
    if missing:
        p.error("missing " + ", ".join(f"--{n}" for n in missing))
    return args


class Say:
    """Prints; after Ctrl-C or SIGTERM it ends the tool at the next line, so between two parts.

    Not at once: Orbax's threads would go on writing into the folder that is being removed.
    """

    def __init__(self) -> None:
        self.signal = 0
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._remember)

    def _remember(self, number: int, _: Any) -> None:
        if self.signal:
            raise KeyboardInterrupt
        self.signal = number
        print("stopping: after this part; nothing will be left", flush=True)

    def __call__(self, line: str) -> None:
        if self.signal:
            sys.exit(128 + self.signal)
        print(line, flush=True)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    logging.set_verbosity(logging.ERROR)  # Orbax tells every step of a save
    began = time.time()
    options = {"dtype": args.dtype, "overwrite": args.overwrite, "say": Say()}
    if args.janusflow:
        hub_import.convert_janusflow(args.janusflow, args.vae, args.out, **options)
    else:
        hub_assemble.assemble(
            args.llm,
            args.siglip,
            args.vae,
            args.out,
            gen_width=args.gen_width,
            seed=args.seed,
            **options,
        )
    print(f"saved to {args.out} after {time.time() - began:.1f} s")


if __name__ == "__main__":
    cli.run(main)
