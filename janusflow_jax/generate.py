"""Generates images:
`python -m janusflow_jax.generate --model runs/emoji --prompt "a red apple"`.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import time
from typing import Any

import jax

from janusflow_jax import cli, pipeline
from janusflow_jax.config.errors import JanusFlowError
from janusflow_jax.config.files import read_lines
from janusflow_jax.eval import provenance, sheet
from janusflow_jax.sampling import inputs

DESCRIPTION = "Generates images for prompts."
EPILOG = """\
examples:
  one image:              --model runs/emoji --prompt "a red apple" --out apple.png
  a sheet, 4 of each:     --model runs/emoji --prompt "a red apple" --prompt "a blue whale" \\
                          --images-per-prompt 4 --out sheet.png
  many, one file each:    --model runs/emoji --prompts prompts.txt --out images --json report.json

Image n of the output uses seed + n; with a seed for each prompt, image j of prompt i uses seed[i] +
j. An image does not depend on the others of its batch, so the seeds of --json reproduce it.
The first image waits for compilation; compiled programs are cached in ~/.cache/janusflow_jax
(JANUSFLOW_COMPILATION_CACHE=FOLDER or off)."""


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    p = cli.parser("generate", DESCRIPTION, EPILOG)
    p.add_argument("--prompt", action="append", default=[], help="what to generate; repeatable")
    p.add_argument("--prompts", metavar="FILE", help="a text file, one prompt a line")
    p.add_argument(
        "--out", default="out.png", help="a .png (a sheet if several), or a folder; default out.png"
    )
    p.add_argument("--images-per-prompt", type=int, default=1, metavar="N")
    p.add_argument(
        "--guidance-scale",
        type=float,
        default=2.0,
        metavar="W",
        help="1: no guidance, twice as fast; higher values follow the prompt more; default 2",
    )
    p.add_argument(  # the name of 0.1; remove in 0.3
        "--cfg",
        type=float,
        dest="guidance_scale",
        default=argparse.SUPPRESS,
        help=argparse.SUPPRESS,
    )
    p.add_argument("--steps", type=int, default=30, help="Euler steps; default 30")
    p.add_argument(
        "--seed", type=int, nargs="+", default=[0], metavar="S", help="one, or one for each prompt"
    )
    p.add_argument("--json", metavar="FILE", help="write a report: seeds, settings, files, seconds")
    return p.parse_args(argv)


def read_prompts(args: argparse.Namespace) -> list[str]:
    """The prompts of the command line, then those of the file."""
    prompts = list(args.prompt)
    if args.prompts:
        prompts += [line for line in read_lines(pathlib.Path(args.prompts)) if line]
    if not prompts:
        raise JanusFlowError(
            "expected --prompt TEXT or --prompts FILE with text in it; got no prompt"
        )
    return prompts


def check_out(path: str) -> pathlib.Path:
    """The output path, which must be a .png or a folder."""
    out = pathlib.Path(path)
    if out.suffix and out.suffix.lower() != ".png" and not out.is_dir():
        raise JanusFlowError(f"--out: expected a .png file or a folder; got {path}")
    return out


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    prompts, out = read_prompts(args), check_out(args.out)
    one_seed = args.seed[0] if len(args.seed) == 1 else args.seed
    seeds = inputs.image_seeds(one_seed, len(prompts), args.images_per_prompt)
    labels = [p for p in prompts for _ in range(args.images_per_prompt)]
    inputs.check_generate(prompts, args.steps, args.images_per_prompt, "pil")
    if args.json:
        cli.check_writable(args.json, "--json")
    model = cli.load(args)
    # The digest of the adapter before generation, in case the file changes meanwhile.
    adapter = provenance.of_adapter(args.adapter) if args.adapter else ""
    (out.parent if out.suffix and not out.is_dir() else out).mkdir(parents=True, exist_ok=True)
    start_time = time.time()
    images: list[Any] = []
    files: list[str] = []
    for begin in range(0, len(labels), pipeline.MAX_BATCH):
        batch = slice(begin, begin + pipeline.MAX_BATCH)
        images += model.generate(
            labels[batch],
            guidance_scale=args.guidance_scale,
            num_steps=args.steps,
            seed=seeds[batch],
        )
        if out.is_dir():
            for n in range(begin, len(images)):
                files.append(str(out / f"{n:04d}.png"))
                images[n].save(files[n])
        progress = f"{len(images)} of {len(labels)} images, {time.time() - start_time:.1f} s"
        cli.log(progress + (" (with compilation)" if not begin else ""))
    seconds = time.time() - start_time
    if not files:
        files = [str(out)]
        image = images[0] if len(images) == 1 else sheet.image_grid(images, labels)
        image.save(out)
    if args.json:
        records = [
            {"prompt": p, "seed": s, "file": files[min(n, len(files) - 1)]}
            for n, (p, s) in enumerate(zip(labels, seeds, strict=True))
        ]
        about = {"path": model.source, "name": model.cfg.name, "weights": args.weights}
        if args.adapter:
            about |= {"adapter": {"path": args.adapter, "sha256": adapter}}
        report = {
            "model": about,
            "settings": {
                "cfg_weight": args.guidance_scale,
                "num_steps": args.steps,
                "dtype": model.dtype,
                "int8": args.int8,
            },
            "software": {"jax": jax.__version__, "device": cli.accelerator()},
            "seconds": round(seconds, 2),
            "pictures": records,
        }
        text = json.dumps(report, indent=1, ensure_ascii=False) + "\n"
        pathlib.Path(args.json).write_text(text, encoding="utf-8")
    print(files[0] if len(files) == 1 else f"{files[0]} .. {files[-1]}")


if __name__ == "__main__":
    cli.run(main)
