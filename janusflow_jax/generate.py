"""Paints pictures: `python -m janusflow_jax.generate --model runs/emoji --prompt "a red apple"`."""

from __future__ import annotations

import argparse
import json
import pathlib
import time
from typing import Any

import jax

from janusflow_jax import cli, pipeline
from janusflow_jax.config.errors import JanusFlowError
from janusflow_jax.eval import provenance, sheet
from janusflow_jax.sampling import inputs

DESCRIPTION = "Paints pictures for prompts."
EPILOG = """\
examples:
  one picture:            --model runs/emoji --prompt "a red apple" --out apple.png
  a sheet, 4 of each:     --model runs/emoji --prompt "a red apple" --prompt "a blue whale" \\
                          --images-per-prompt 4 --out sheet.png
  many, one file each:    --model runs/emoji --prompts prompts.txt --out pictures --json report.json

Picture n of the output uses seed + n; with a seed for each prompt, picture j of prompt i uses
seed[i] + j. A picture is the same whatever is painted beside it, so --json's seeds paint it again.
The first picture waits for compilation; compiled programs are kept in ~/.cache/janusflow_jax
(JANUSFLOW_COMPILATION_CACHE=FOLDER or off)."""


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    p = cli.parser("generate", DESCRIPTION, EPILOG)
    p.add_argument("--prompt", action="append", default=[], help="what to paint; repeatable")
    p.add_argument("--prompts", metavar="FILE", help="a text file, one prompt a line")
    p.add_argument(
        "--out", default="out.png", help="a .png (a sheet if several), or a folder; default out.png"
    )
    p.add_argument("--images-per-prompt", type=int, default=1, metavar="N")
    p.add_argument(
        "--cfg",
        type=float,
        default=2.0,
        metavar="W",
        help="guidance: 1 is none (twice as fast), more follows the prompt more; default 2",
    )
    p.add_argument("--steps", type=int, default=30, help="Euler steps; default 30")
    p.add_argument(
        "--seed", type=int, nargs="+", default=[0], metavar="S", help="one, or one for each prompt"
    )
    p.add_argument("--json", metavar="FILE", help="write a report: seeds, settings, files, seconds")
    return p.parse_args(argv)


def read_prompts(args: argparse.Namespace) -> list[str]:
    """Those of the command line, then those of the file."""
    prompts = list(args.prompt)
    if args.prompts:
        lines = pathlib.Path(args.prompts).read_text(encoding="utf-8").splitlines()
        prompts += [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise JanusFlowError(
            "expected --prompt TEXT or --prompts FILE with text in it; got no prompt"
        )
    return prompts


def check_out(path: str) -> pathlib.Path:
    """The output's path; refuses what is neither a .png nor a folder."""
    out = pathlib.Path(path)
    if out.suffix and out.suffix.lower() != ".png" and not out.is_dir():
        raise JanusFlowError(f"--out: expected a .png file or a folder; got {path}")
    return out


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    prompts, out = read_prompts(args), check_out(args.out)
    one_seed = args.seed[0] if len(args.seed) == 1 else args.seed
    seeds = inputs.picture_seeds(one_seed, len(prompts), args.images_per_prompt)
    labels = [p for p in prompts for _ in range(args.images_per_prompt)]
    inputs.check_generate(prompts, args.steps, args.images_per_prompt, "pil")
    if args.json:
        cli.check_writable(args.json, "--json")
    model = cli.load(args)
    adapter = provenance.of_adapter(args.adapter) if args.adapter else ""  # as it was loaded
    (out.parent if out.suffix and not out.is_dir() else out).mkdir(parents=True, exist_ok=True)
    began = time.time()
    pictures: list[Any] = []
    files: list[str] = []
    for at in range(0, len(labels), pipeline.MAX_BATCH):
        here = slice(at, at + pipeline.MAX_BATCH)
        pictures += model.generate(
            labels[here], cfg_weight=args.cfg, num_steps=args.steps, seed=seeds[here]
        )
        if out.is_dir():
            for n in range(at, len(pictures)):
                files.append(str(out / f"{n:04d}.png"))
                pictures[n].save(files[n])
        done = f"{len(pictures)} of {len(labels)} pictures, {time.time() - began:.1f} s"
        cli.log(done + (" (with compilation)" if not at else ""))
    seconds = time.time() - began
    if not files:
        files = [str(out)]
        image = pictures[0] if len(pictures) == 1 else sheet.make_sheet(pictures, labels)
        image.save(out)
    if args.json:
        made = [
            {"prompt": p, "seed": s, "file": files[min(n, len(files) - 1)]}
            for n, (p, s) in enumerate(zip(labels, seeds, strict=True))
        ]
        about = {"path": model.source, "name": model.cfg.name, "weights": args.weights}
        if args.adapter:
            about |= {"adapter": {"path": args.adapter, "sha256": adapter}}
        report = {
            "model": about,
            "settings": {
                "cfg_weight": args.cfg,
                "num_steps": args.steps,
                "dtype": model.dtype,
                "int8": args.int8,
            },
            "software": {"jax": jax.__version__, "device": cli.accelerator()},
            "seconds": round(seconds, 2),
            "pictures": made,
        }
        text = json.dumps(report, indent=1, ensure_ascii=False) + "\n"
        pathlib.Path(args.json).write_text(text, encoding="utf-8")
    print(files[0] if len(files) == 1 else f"{files[0]} .. {files[-1]}")


if __name__ == "__main__":
    cli.run(main)
