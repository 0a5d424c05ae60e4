"""Compares students with their teacher on the same noise; makes docs/few_steps.png.

    python -m janusflow_jax.train --config=configs/distill.py:emoji
    python experiments/few_steps.py                 # the table of docs/few_steps.md

The prompts and their noise are those of `evaluate` (96 trained pairs). The distance is that of
latents from the teacher's guided solution, in 30 steps of order 2, relative to its size.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

import janusflow_jax
from janusflow_jax import cli, pipeline
from janusflow_jax.eval import sheet
from janusflow_jax.openmoji import judge as judge_lib, prompts, suite
from janusflow_jax.openmoji.scores import Label

REFERENCE: dict[str, Any] = {"num_steps": 30, "order": 2}
TEACHER_STEPS, STUDENT_STEPS = (1, 2, 4, 30), (1, 2, 4)
COLUMNS = 8
"""Of the sheet."""


def main(argv: list[str] | None = None) -> None:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--teacher", default="runs/emoji")
    p.add_argument("--student", nargs="+", default=["runs/distill-emoji"])
    p.add_argument("--data", default="data/openmoji")
    p.add_argument("--count", type=int, default=96, help="prompts; default 96")
    p.add_argument("--captions", type=int, default=200, help="images to caption per split")
    p.add_argument("--sheet", default="docs/few_steps.png", help="of the first student")
    args = p.parse_args(argv)
    refs, judge = suite.references(args.data), judge_lib.load(judge_lib.START)
    of_sheet = [Label(name, color) for color, name, _ in prompts.SHEET]
    others = sorted(refs.unseen.keys() - of_sheet)
    labels = [others[i] for i in np.random.default_rng(0).permutation(len(others))[: args.count]]
    texts = [prompts.caption(x.color, x.name) for x in labels]
    noise = {"seed": suite.MORE_SEED, "output": "latent"}
    print(
        "| model | steps | evaluations | distance | looks like the prompt | right hue | "
        "median rank | Frechet |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    shown: list[np.ndarray] = []
    want = np.zeros(())
    for path in (args.teacher, *args.student):
        model = janusflow_jax.load(path)
        is_student = model.cfg.student.steps > 0
        if path == args.teacher:
            want = model.generate(texts, **noise, **REFERENCE)
        for steps in STUDENT_STEPS if is_student else TEACHER_STEPS:
            got = model.generate(texts, num_steps=steps, **noise)
            distance = np.sqrt(((got - want) ** 2).mean() / (want**2).mean())
            images = model.decode_latents(got, "numpy")
            cells = row(images, labels, refs, judge)
            evaluations = steps if is_student else 2 * steps
            print(f"| {path} | {steps} | {evaluations} | {distance:.3f} | {cells} |", flush=True)
            if path in (args.teacher, args.student[0]):
                shown += list(images[:COLUMNS])
        print(f"{path}: {captions(model, args.data, args.captions)}", flush=True)
    grid = sheet.image_grid(shown, texts[:COLUMNS] * (len(shown) // COLUMNS), COLUMNS)
    sheet.save(grid, args.sheet)
    print(f"{args.sheet}; its rows: teacher {TEACHER_STEPS}, student {STUDENT_STEPS} steps")


def row(
    images: np.ndarray,
    labels: list[Label],
    refs: suite.References,
    judge: judge_lib.LoadedJudge,
) -> str:
    """The scores of images, as cells of the table."""
    scored = suite.score_images(list(images), labels, refs, judge)
    drawn = [refs.unseen[x] for x in labels]
    frechet = judge_lib.score_frechet(
        judge,
        list(images),
        reference=[x for label in labels for x in refs.views[label][:2]],
        drawn=drawn,
        other_prompts=drawn[::-1],
    )["painted"]
    hue, rank = scored["hue"], scored["retrieval"]["median_rank"]
    alignment = scored["alignment"]["likeness"]["score"]
    return f"{alignment:.3f} | {hue['right']} of {hue['of']} | {rank:g} | {frechet:.3f}"


def captions(model: pipeline.Pipeline, data: str, count: int) -> str:
    """How many captions of held-out images are exact."""
    if not count:
        return "captions not measured"
    got = {s: suite.score_captioning(model, data, s, count) for s in suite.CAPTION_SPLITS[:2]}
    return ", ".join(f"{x['exact']['right']} of {x['of']} captions of {s}" for s, x in got.items())


if __name__ == "__main__":
    cli.run(main)
