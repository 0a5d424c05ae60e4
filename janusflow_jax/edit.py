"""Changes an image:
`python -m janusflow_jax.edit --model runs/emoji --image frog.png --prompt "a red frog"`.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports, which take seconds
    from janusflow_jax.config import signals

    signals.end_on_signals()

import argparse

from janusflow_jax import cli
from janusflow_jax.config import files
from janusflow_jax.config.errors import JanusFlowError
from janusflow_jax.data import image_files
from janusflow_jax.sampling import inputs

DESCRIPTION = "Changes an image. The model was not trained to edit: see docs/editing.md."
EPILOG = """\
examples:
  change what the prompt changes:  --image frog.png --prompt "a red frog"
  generate a part again:           --image frog.png --prompt "a frog" --mask mask.png
  vary the whole image:            --image frog.png --prompt "a frog" --vary 0.6

Without --mask and --vary the image moves by the difference between what the model would do for
--prompt and for what the image shows now (FlowEdit). The model describes the image itself, unless
--source does."""


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    p = cli.parser("edit", DESCRIPTION, EPILOG)
    p.add_argument("--image", required=True, help="cropped to a square of the model's size")
    p.add_argument("--prompt", required=True, help="what the image will show")
    p.add_argument("--out", default="out.png", help="a .png; default out.png")
    p.add_argument("--source", metavar="TEXT", help="what the image shows now")
    p.add_argument(
        "--source-guidance-scale", type=float, metavar="W", help="of what it shows now; default 2"
    )
    p.add_argument(
        "--strength",
        type=float,
        metavar="S",
        help="share of the steps that change the image, from 0 to 1; default 1",
    )
    p.add_argument("--mask", metavar="FILE", help="as large as the image; white is generated again")
    p.add_argument(
        "--vary",
        type=float,
        metavar="S",
        help="start from the image and generate this share of the steps again",
    )
    p.add_argument(
        "--guidance-scale", type=float, metavar="W", help="of --prompt; default 2, of a student 1"
    )
    cli.add_solver_options(p)
    p.add_argument("--seed", type=int, default=0, metavar="S")
    args = p.parse_args(argv)
    if args.mask and args.vary is not None:
        raise JanusFlowError("expected --mask or --vary; got both")
    if args.mask or args.vary is not None:
        for name in ("source", "source_guidance_scale", *["strength"][: args.vary is not None]):
            if getattr(args, name) is not None:
                raise JanusFlowError(
                    f"--{name.replace('_', '-')}: expected without "
                    f"{'--mask' if args.mask else '--vary'}; got both"
                )
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    out = cli.check_writable(args.out, "--out")
    if out.suffix.lower() != ".png":
        raise JanusFlowError(f"--out: expected a .png file; got {args.out}")
    options = {
        "guidance_scale": args.guidance_scale,
        "seed": args.seed,
        **cli.solver_options(args),
    }
    if args.strength is not None:
        options["strength"] = args.strength
    model = cli.load(args)
    sampler, scale = inputs.check_generate(
        [args.prompt],
        1,
        guidance_scale=args.guidance_scale,
        student=model.cfg.student,
        **cli.solver_options(args),
    )
    about = {"prompt": args.prompt, "seed": args.seed, "num_inference_steps": sampler.steps}
    about |= {"guidance_scale": scale, "model": model.cfg.name}
    if args.mask:
        about["method"] = "inpaint"
        (image,) = model.inpaint(args.image, args.mask, args.prompt, **options)
    elif args.vary is not None:
        about |= {"method": "vary", "strength": args.vary}
        (image,) = model.vary(args.image, args.prompt, strength=args.vary, **options)
    else:
        source = args.source
        if source is None:
            (source,) = model.describe([args.image])
            cli.log(f"the image shows, says the model: {source!r} (--source TEXT replaces it)")
        about |= {"method": "edit", "source": source}
        if args.source_guidance_scale is not None:
            options["source_guidance_scale"] = args.source_guidance_scale
        (image,) = model.edit(args.image, args.prompt, sources=source, **options)
    with files.naming(out):
        image_files.save(image, out, about)
    print(out)


if __name__ == "__main__":
    cli.run(main)
