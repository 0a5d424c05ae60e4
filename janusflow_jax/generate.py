"""Generates images:
`python -m janusflow_jax.generate --model runs/emoji --prompt "a red apple"`.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports, which take seconds
    from janusflow_jax.config import signals

    signals.end_on_signals()

import argparse
import json
import time
from typing import Any

import jax
from etils import epath

from janusflow_jax import cli, pipeline
from janusflow_jax.config import files as config_files
from janusflow_jax.config.errors import DivergedError, JanusFlowError
from janusflow_jax.data import image_files
from janusflow_jax.eval import provenance, sheet
from janusflow_jax.parallel import numerics
from janusflow_jax.sampling import inputs

DESCRIPTION = "Generates images for prompts."
EPILOG = """\
examples:
  one image:              --model runs/emoji --prompt "a red apple" --out apple.png
  a sheet, 4 of each:     --model runs/emoji --prompt "a red apple" --prompt "a blue whale" \\
                          --images-per-prompt 4 --out sheet.png
  many, one file each:    --model runs/emoji --prompts prompts.txt --out images --json report.json

Image n of the output uses seed + n; with a seed for each prompt, image j of prompt i uses seed[i] +
j. In batches of one shape, which --json records (rows and prompt positions), an image does not
depend on the others. At another shape its pixels differ by rounding: on a CPU by up to 3 of 255 in
bfloat16, and not at all in float32.
A PNG of one image holds its prompt, seed and settings; every PNG has the standard mark of images
that a model generated.
Non-finite images are named and not written, and the exit status is 1.
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
        metavar="W",
        help="1: no guidance, twice as fast; higher values follow the prompt more; default 2, of a "
        "student 1",
    )
    p.add_argument(  # the name of 0.1; remove in 0.3
        "--cfg",
        type=float,
        dest="guidance_scale",
        default=argparse.SUPPRESS,
        help=argparse.SUPPRESS,
    )
    cli.add_solver_options(p)
    p.add_argument(
        "--seed", type=int, nargs="+", default=[0], metavar="S", help="one, or one for each prompt"
    )
    p.add_argument("--json", metavar="FILE", help="write a report: seeds, settings, files, seconds")
    return p.parse_args(argv)


def read_prompts(args: argparse.Namespace) -> list[str]:
    """The prompts of the command line, then those of the file."""
    prompts = list(args.prompt)
    if args.prompts:
        prompts += [x for x in config_files.read_lines(config_files.resolve(args.prompts)) if x]
    if not prompts:
        raise JanusFlowError(
            "expected --prompt TEXT or --prompts FILE with text in it; got no prompt"
        )
    return prompts


def check_out(path: str) -> epath.Path:
    """The output path, which must be a .png or a folder."""
    out = config_files.resolve(path)
    if out.suffix and out.suffix.lower() != ".png" and not out.is_dir():
        raise JanusFlowError(f"--out: expected a .png file or a folder; got {path}")
    return out


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    prompts, out = read_prompts(args), check_out(args.out)
    one_seed = args.seed[0] if len(args.seed) == 1 else args.seed
    seeds = inputs.image_seeds(one_seed, len(prompts), args.images_per_prompt)
    labels = [p for p in prompts for _ in range(args.images_per_prompt)]
    solver = cli.solver_options(args)
    solver["guidance_scale"] = args.guidance_scale
    inputs.check_generate(prompts, args.images_per_prompt, **solver)
    is_folder = out.is_dir() or not out.suffix
    cli.check_writable(str(out / "0000.png" if is_folder else out), "--out")
    if args.json:
        cli.check_writable(args.json, "--json")
    model = cli.load(args)
    sampler, solver["guidance_scale"] = inputs.check_generate(
        prompts, args.images_per_prompt, student=model.cfg.student, **solver
    )
    solver["num_steps"] = sampler.steps
    ids = model.prompt_ids(labels)  # a prompt that is too long fails before the first image
    # The digest of the adapter before generation, in case the file changes meanwhile.
    adapter = provenance.of_adapter(args.adapter) if args.adapter else ""
    sha256 = provenance.digest(model.source, args.adapter)

    def settings(n: int) -> dict[str, Any]:
        """What image n's file says of it."""
        return image_files.settings(
            prompt=labels[n],
            seed=seeds[n],
            sampler=sampler,
            guidance_scale=solver["guidance_scale"],
            model=model.cfg.name,
            model_sha256=sha256,
        )

    start_time = time.time()
    images: list[Any] = []
    shapes: list[dict[str, int]] = []
    files = [str(out / f"{n:04d}.png" if is_folder else out) for n in range(len(labels))]
    for begin in range(0, len(labels), pipeline.MAX_BATCH):
        batch = slice(begin, begin + pipeline.MAX_BATCH)
        try:
            images += model.generate(labels[batch], seed=seeds[batch], **solver)
        except DivergedError as error:  # reported at the end, with the other batches' images
            images += error.images
        rows, positions = inputs.batch_shape(ids[batch])
        shapes += [{"rows": rows, "positions": positions}] * len(ids[batch])
        for n in range(begin, len(images)):
            if is_folder and images[n] is not None:
                with config_files.naming(files[n]):
                    image_files.save(images[n], files[n], settings(n))
        progress = f"{len(images)} of {len(labels)} images, {time.time() - start_time:.1f} s"
        cli.log(progress + (" (with compilation)" if not begin else ""))
    seconds = time.time() - start_time
    bad = [n for n, image in enumerate(images) if image is None]
    if not is_folder and not bad:
        single = len(images) == 1
        image = images[0] if single else sheet.image_grid(images, labels)
        with config_files.naming(out):
            image_files.save(image, out, settings(0) if single else {})
    if args.json:
        missing = bad if is_folder else range(len(images) if bad else 0)
        records = [
            {
                "prompt": labels[n],
                "seed": seeds[n],
                "file": None if n in missing else files[n],
                **shapes[n],
            }
            for n in range(len(images))
        ]
        about = {"path": model.source, "name": model.cfg.name, "weights": args.weights}
        if args.adapter:
            about |= {"adapter": {"path": args.adapter, "sha256": adapter}}
        report = {
            "model": about,
            "settings": {
                "cfg_weight": solver.pop("guidance_scale"),
                **solver,
                "dtype": model.dtype,
                "int8": args.int8,
            },
            "software": {"jax": jax.__version__, "device": cli.accelerator()},
            "numerics": numerics.described(),
            "seconds": round(seconds, 2),
            "images": records,
        }
        text = json.dumps(report, indent=1, ensure_ascii=False) + "\n"
        with config_files.naming(args.json):
            config_files.resolve(args.json).write_text(text, encoding="utf-8")
    if bad:
        names = ", ".join(f"{n} ({labels[n]!r}, seed {seeds[n]})" for n in bad[:5])
        raise DivergedError(
            f"expected finite images; got NaN or infinity in {len(bad)} of {len(images)}, which "
            f"were not written: {names}{', ...' if len(bad) > 5 else ''}: "
            f"{pipeline.NON_FINITE_ADVICE}"
        )
    print(files[0] if len({*files}) == 1 else f"{files[0]} .. {files[-1]}")


if __name__ == "__main__":
    cli.run(
        main,
        out_of_memory="use shorter prompts, fewer of them, --dtype bfloat16 or --int8",
    )
