"""Compares solvers by their distance from the exact solution, and ranks images by the model.

    python experiments/sampling.py --model runs/emoji       # what docs/sampling.md shows

The distance is that of latents from a solution in 200 steps of order 2, on the same noise, relative
to their size. The best of several images is chosen by the likelihood of the prompt that the model
gives, and is scored by what did not choose: retrieval by silhouette, and the judge.
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
from janusflow_jax.openmoji import drawings, judge as judge_lib, prompts, scores, suite
from janusflow_jax.openmoji.scores import Label

SEED = 1000
REFERENCE: dict[str, Any] = {"num_steps": 200, "order": 2}
SOLVERS: tuple[dict[str, Any], ...] = (
    *({"num_steps": n} for n in (5, 8, 15, 30, 60)),
    *({"num_steps": n, "order": 2} for n in (5, 8, 12, 15, 30)),
    *({"num_steps": 8, "order": 2, "shift": s} for s in (2.0, 3.0)),
)
SHOWN: tuple[dict[str, Any], ...] = tuple(
    {"num_steps": n, "order": order} for order in (1, 2) for n in (5, 15, 30)
)
COLUMNS = 8
"""Of the sheet."""


def main(argv: list[str] | None = None) -> None:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--model", default="runs/emoji")
    p.add_argument("--data", default="data/openmoji")
    p.add_argument("--count", type=int, default=64, help="prompts; default 64")
    p.add_argument("--best-of", type=int, default=8, help="images to choose from; default 8")
    p.add_argument("--sheet", default="docs/sampling.png", help="images of some solvers")
    args = p.parse_args(argv)
    model = janusflow_jax.load(args.model)
    refs, judge = suite.references(args.data), judge_lib.load(judge_lib.START)
    labels = sorted(refs.unseen)
    order = np.random.default_rng(1).permutation(len(labels))[: args.count]
    labels = [labels[i] for i in order]
    compare_solvers(model, labels, refs, judge)
    show_solvers(model, labels[:COLUMNS], args.sheet)
    compare_intervals(model, labels, refs, judge)
    rank(model, labels, refs, judge, args.best_of)


def caption(label: Label) -> str:
    return prompts.caption(label.color, label.name)


def frechet(
    images: np.ndarray, labels: list[Label], refs: suite.References, judge: judge_lib.LoadedJudge
) -> float:
    """The judge's Frechet distance from other views of the same drawings."""
    drawn = [refs.unseen[x] for x in labels]
    reference = [x for label in labels for x in refs.views[label][:2]]
    got = judge_lib.score_frechet(
        judge, list(images), reference=reference, drawn=drawn, other_prompts=drawn[::-1]
    )
    return got["painted"]


def compare_solvers(
    model: pipeline.Pipeline,
    labels: list[Label],
    refs: suite.References,
    judge: judge_lib.LoadedJudge,
) -> None:
    """Prints the distance of every solver from the reference, and two scores of its images."""
    texts = [caption(x) for x in labels]
    want = model.generate(texts, seed=SEED, output="latent", **REFERENCE)
    print("| steps | order | shift | distance | looks like the prompt | Frechet |")
    print("| --- | --- | --- | --- | --- | --- |")
    for solver in SOLVERS:
        got = model.generate(texts, seed=SEED, output="latent", **solver)
        distance = np.sqrt(((got - want) ** 2).mean() / (want**2).mean())
        images = model.decode_latents(got, "numpy")
        print(
            f"| {solver['num_steps']} | {solver.get('order', 1)} | {solver.get('shift', 1):g} | "
            f"{distance:.4f} | {likeness(images, labels, refs, judge).mean():.3f} | "
            f"{frechet(images, labels, refs, judge):.3f} |",
            flush=True,
        )


def show_solvers(model: pipeline.Pipeline, labels: list[Label], path: str) -> None:
    """A sheet with one row a solver, for the same noise."""
    texts = [caption(x) for x in labels]
    rows = [model.generate(texts, seed=SEED, output="numpy", **solver) for solver in SHOWN]
    sheet.save(sheet.image_grid([x for row in rows for x in row], texts * len(rows), COLUMNS), path)
    print(f"{path}; its rows: {SHOWN}")


def compare_intervals(
    model: pipeline.Pipeline,
    labels: list[Label],
    refs: suite.References,
    judge: judge_lib.LoadedJudge,
) -> None:
    """Prints scores for guidance in a part of the path."""
    texts = [caption(x) for x in labels]
    print("\n| guidance scale | interval | looks like the prompt | right hue | Frechet |")
    print("| --- | --- | --- | --- | --- |")
    for scale in (2.0, 4.0):
        for interval in ((0.0, 1.0), (0.0, 0.5), (0.25, 1.0)):
            images = model.generate(
                texts,
                seed=SEED,
                guidance_scale=scale,
                guidance_interval=interval,
                output="numpy",
            )
            hue = scores.score_hues(list(images), labels)
            print(
                f"| {scale:g} | {interval[0]:g} to {interval[1]:g} | "
                f"{likeness(images, labels, refs, judge).mean():.3f} | "
                f"{hue['right']} of {hue['of']} | {frechet(images, labels, refs, judge):.3f} |",
                flush=True,
            )


def likeness(
    images: np.ndarray, labels: list[Label], refs: suite.References, judge: judge_lib.LoadedJudge
) -> np.ndarray:
    """The judge's cosine between each image and its prompt."""
    texts = judge.embed_texts(labels)
    return (judge.embed_images(list(images)) * texts).sum(1)


def rank(
    model: pipeline.Pipeline,
    labels: list[Label],
    refs: suite.References,
    judge: judge_lib.LoadedJudge,
    best_of: int,
) -> None:
    """Prints what choosing one of several images gains over a random one of them."""
    texts = [caption(x) for x in labels]
    images = model.generate(
        texts, images_per_prompt=best_of, seed=SEED, num_steps=15, order=2, output="numpy"
    )
    repeated = [x for x in labels for _ in range(best_of)]
    shape = (len(labels), best_of)
    # captions of the data come in three forms
    forms = [
        model.caption_scores(
            list(images), [drawings.captions(x.color, x.name)[i] for x in repeated]
        )
        for i in range(3)
    ]
    one, every = forms[0].reshape(shape), np.logaddexp.reduce(forms, axis=0).reshape(shape)
    table, candidates = scores.ranks(list(images), labels, refs.gallery)
    own = table.reshape(*shape, -1)[np.arange(len(labels)), :, np.arange(len(labels))]
    percentile = 1 - (own - 1) / (np.asarray(candidates)[:, None] - 1)
    judged = likeness(images, repeated, refs, judge).reshape(shape)
    print(f"\n| choice of {best_of} | retrieval percentile | looks like the prompt |")
    print("| --- | --- | --- |")
    random = np.random.default_rng(0)
    print(f"| mean of all | {percentile.mean():.3f} | {judged.mean():.3f} |")
    for name, by in {
        "the first": -np.arange(best_of)[None].repeat(len(labels), 0),
        "`best_of`: likelihood of the prompt": one,
        "likelihood of the prompt in any of three forms": every,
        "the least likely": -one,
        "by the judge (an upper bound)": judged,
    }.items():
        pick = np.asarray(by).argmax(1)
        cells = []
        for score in (percentile, judged):
            gain = score[np.arange(len(pick)), pick] - score.mean(1)
            draws = random.choice(gain, (2000, len(gain))).mean(1)
            low, high = np.quantile(draws, [0.025, 0.975])
            cells.append(f"{gain.mean():+.3f} ({low:+.3f} to {high:+.3f})")
        print(f"| {name} | {cells[0]} | {cells[1]} |", flush=True)


if __name__ == "__main__":
    cli.run(main)
