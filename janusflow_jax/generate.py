"""Paints pictures: `python -m janusflow_jax.generate --model runs/emoji --prompt "a red apple"`."""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
import time

from janusflow_jax import checkpoint, pipeline
from janusflow_jax.eval import sheet


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    p = argparse.ArgumentParser(
        prog="python -m janusflow_jax.generate",
        description="Paints pictures for prompts with a model folder or a training run's folder.",
        epilog="Picture n of the output uses seed + n, so any of them can be painted again alone.",
    )
    p.add_argument("--model", required=True, help="model folder, workdir or one checkpoint of it")
    p.add_argument("--prompt", action="append", default=[], help="what to paint; repeatable")
    p.add_argument("--prompts", help="a text file, one prompt a line")
    p.add_argument("--out", default="out.png", help="a .png (a sheet if several), or a folder")
    p.add_argument("--images-per-prompt", type=int, default=1)
    p.add_argument("--cfg", type=float, default=2.0, help="guidance weight; 1 is none")
    p.add_argument("--steps", type=int, default=30, help="Euler steps")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: by accelerator")
    p.add_argument("--weights", choices=("ema", "params"), default="ema")
    p.add_argument("--json", help="write a report (seeds, settings, seconds) to this file")
    return p.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    prompts = list(args.prompt)
    if args.prompts:
        lines = pathlib.Path(args.prompts).read_text(encoding="utf-8").splitlines()
        prompts += [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ValueError("expected --prompt TEXT or --prompts FILE; got neither")
    model = pipeline.load(args.model, dtype=args.dtype, weights=args.weights)
    began = time.time()
    pictures = model.generate(
        prompts,
        cfg_weight=args.cfg,
        num_steps=args.steps,
        seed=args.seed,
        images_per_prompt=args.images_per_prompt,
    )
    seconds = time.time() - began
    labels = [p for p in prompts for _ in range(args.images_per_prompt)]
    out = pathlib.Path(args.out)
    if out.suffix.lower() == ".png":
        out.parent.mkdir(parents=True, exist_ok=True)
        image = pictures[0] if len(pictures) == 1 else sheet.make_sheet(pictures, labels)
        image.save(out)
        files = [str(out)]
    else:
        out.mkdir(parents=True, exist_ok=True)
        files = [str(out / f"{n:04d}.png") for n in range(len(pictures))]
        for picture, file in zip(pictures, files, strict=True):
            picture.save(file)
    if args.json:
        settings = {"model": args.model, "cfg_weight": args.cfg, "num_steps": args.steps}
        made = [{"prompt": p, "seed": args.seed + n} for n, p in enumerate(labels)]
        report = {**settings, "seconds": seconds, "files": files, "pictures": made}
        pathlib.Path(args.json).write_text(json.dumps(report, indent=1))
    print(f"{len(pictures)} picture(s) in {seconds:.1f} s (compilation included): {files[0]}")


def run() -> None:
    """The command line; errors that the user can mend are one message, not a stack."""
    try:
        main()
    except (checkpoint.CheckpointError, ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    run()
