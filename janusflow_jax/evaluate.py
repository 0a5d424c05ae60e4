"""Scores a model: `python -m janusflow_jax.evaluate --model runs/emoji --out eval.json`.

Suite `emoji`, for models of the quick start: generates the 24 prompts of the sheet and more trained
pairs, and scores their hue, the retrieval of the right drawing, and their alignment and Frechet
distance in the feature space of the project's own judge (not CLIP score, not FID). Captions images
of every split. Every score stands beside its baseline.

Suite `losses`, for any model: the held-out losses that a training run of `--config` measures.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports, which take seconds
    from janusflow_jax.config import signals

    signals.end_on_signals()

import argparse
import json
import math
import time
from typing import Any

from etils import epath

from janusflow_jax import cli, config as config_lib, pipeline
from janusflow_jax.checkpoints import checksums
from janusflow_jax.config import files, flags as config_flags
from janusflow_jax.config.errors import DivergedError, JanusFlowError
from janusflow_jax.eval import losses as losses_lib, provenance
from janusflow_jax.openmoji import judge as judge_lib, prompts, suite
from janusflow_jax.parallel import numerics
from janusflow_jax.sampling import inputs

SUITES = ("emoji", "losses")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    p = cli.parser(
        "evaluate",
        "Scores what a model generates and its captions, each beside a baseline.",
        "The same model, data and options give the same report, except its time.",
    )
    p.add_argument(
        "--suite", choices=SUITES, help="default: emoji for a model of the quick start, else none"
    )
    p.add_argument(
        "--config", default="", help="suite losses: the training config with held-out sources"
    )
    p.add_argument("--data", default="data/openmoji", help="from tools/prepare_openmoji.py")
    p.add_argument(
        "--out",
        help="the report; the sheet goes beside it (.png); default eval.json, if there is none yet",
    )
    p.add_argument(
        "--judge",
        default=judge_lib.START,
        help="from experiments/starts/train_judge.py; '': no scores of the judge",
    )
    p.add_argument(
        "--prompts",
        type=int,
        default=96,
        metavar="N",
        help="number of trained pairs to generate beside the sheet (generate's --prompts is a "
        "file); 0: generate nothing; fewer than 4: no Frechet distance",
    )
    p.add_argument(
        "--captions", type=int, default=200, metavar="N", help="images to caption per split"
    )
    # reports call it cfg
    p.add_argument(
        "--guidance-scale",
        dest="cfg",
        type=float,
        metavar="W",
        help="1: no guidance; default 2, of a student 1",
    )
    p.add_argument(  # the name of 0.1; remove in 0.3
        "--cfg", type=float, default=argparse.SUPPRESS, help=argparse.SUPPRESS
    )
    cli.add_solver_options(p)
    p.add_argument("--seed", type=int, default=0)
    return p.parse_args(argv)


@numerics.fixed()
def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    folder = provenance.resolve(args.model)
    if args.out is None and epath.Path("eval.json").exists():
        raise JanusFlowError("eval.json exists: name the report with --out (it may be the same)")
    args.out = args.out or "eval.json"
    out = cli.check_writable(args.out, "--out")
    began = time.time()
    report = losses(args, folder) if args.suite == "losses" else emoji(args, folder, out)
    report["seconds"] = round(time.time() - began, 1)
    report["numerics"] = numerics.described()
    text = json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    with files.naming(out):
        out.write_text(text, encoding="utf-8")
    print(f"{report['seconds']:.0f} s (compilation included); the report: {out}")


def losses(args: argparse.Namespace, folder: epath.Path) -> dict[str, Any]:
    """The report of suite `losses`.

    Raises:
      JanusFlowError: no config, or int8, which this suite does not measure.
    """
    if not args.config or args.int8:
        raise JanusFlowError("--suite losses: expected --config and no --int8")
    cfg = config_flags.read_config(args.config)
    result = losses_lib.measure(str(folder), cfg, args.weights, args.dtype, args.adapter)
    if bad := [name for name, value in result.items() if not math.isfinite(value)]:
        raise DivergedError(
            f"{args.model}: expected finite held-out losses; got NaN or infinity in {bad}"
        )
    print("\n".join(f"{name}: {value:.4f}" for name, value in result.items()))
    names = ("suite", "config", "weights", "dtype", "adapter")
    # the description of the data, not its records: they may be terabytes
    infos = {s.path: files.resolve(s.path) / "dataset_info.json" for s in cfg.evaluate.sources}
    return {
        "settings": {**{n: getattr(args, n) for n in names}, "model": str(folder)},
        "evaluate": config_lib.to_dict(cfg.evaluate),
        "model": provenance.of(folder, args.adapter),
        "data": {p: {"dataset_info_sha256": provenance.sha256(x)} for p, x in infos.items()},
        "software": provenance.software(),
        "losses": result,
    }


def emoji(args: argparse.Namespace, folder: epath.Path, out: epath.Path) -> dict[str, Any]:
    """The report of suite `emoji`. The sheet goes beside `out`.

    Raises:
      JanusFlowError: options that leave nothing to compare; a seed out of range; without
        `--suite`, a model that is not the quick start's.
    """
    if min(args.prompts, args.captions) < 0 or 1 in (args.prompts, args.captions):
        raise JanusFlowError(
            "--prompts, --captions: expected 0, or 2 or more (scores compare items with each "
            f"other); got {args.prompts} and {args.captions}"
        )
    if not (args.prompts or args.captions):
        raise JanusFlowError("--prompts, --captions: got 0 and 0: nothing to score")
    solver = cli.solver_options(args)
    inputs.check_generate(["any"], 1, guidance_scale=args.cfg, **solver)
    for first in (args.seed, args.seed + suite.MORE_SEED):
        inputs.image_seeds(first, max(args.prompts, len(prompts.PROMPTS)), 1)
    sheet_file = out.with_suffix(".png")
    if sheet_file == out:
        raise JanusFlowError(
            f"--out: expected a file such as eval.json; got the sheet's name {out}"
        )
    if not args.suite:
        _check_is_emoji(folder)
    files.resolve(args.data)  # a bucket that cannot be opened ends the command here
    judge = judge_lib.load(args.judge) if args.judge and args.prompts else None
    model = pipeline.load(
        str(folder), dtype=args.dtype, weights=args.weights, int8=args.int8, adapter=args.adapter
    )
    sampler, args.cfg = inputs.check_generate(
        ["any"], 1, guidance_scale=args.cfg, student=model.cfg.student, **solver
    )
    args.steps = solver["num_steps"] = sampler.steps
    report: dict[str, Any] = {
        "settings": {**vars(args), "suite": "emoji", "model": str(folder)},
        "model": provenance.of(folder, args.adapter),
        "data": provenance.of_data(args.data),
        "software": provenance.software(),
    }
    if judge:
        report["judge"] = {"weights_sha256": judge.sha256, "accuracy": judge.about["accuracy"]}
    if args.captions:  # before the images, which take longer: a model that lacks a part stops here
        report["captions"] = {
            split: suite.score_captioning(model, args.data, split, args.captions)
            for split in suite.CAPTION_SPLITS
        }
    if args.prompts:
        report |= suite.score_generation(
            model,
            suite.references(args.data),
            judge,
            count=args.prompts,
            guidance_scale=args.cfg,
            solver=solver,
            seed=args.seed,
            sheet_file=sheet_file,
        )
    print(suite.table(report))
    return report


def _check_is_emoji(folder: epath.Path) -> None:
    """Refuses another model than the quick start's by its config, before the model is loaded."""
    for file in (folder / "model.json", folder / "run.json"):
        if file.exists():
            config = checksums.read_json(file)["config"]
            name = config.get("model", config)["name"]
            if name != config_lib.model_config("emoji").name:
                raise JanusFlowError(
                    f"--suite: expected one of {SUITES} for the model {name!r}; got none: pass "
                    "--suite losses (suite emoji scores the quick start's drawings)"
                )


if __name__ == "__main__":
    cli.run(main)
