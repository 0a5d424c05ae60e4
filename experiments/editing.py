"""Compares ways to change an image, on drawings that get another color; makes docs/editing.png.

    python experiments/editing.py --model runs/emoji        # the table of docs/editing.md

The sources are views that training never saw, of pairs that it did; so are the pairs of the
targets. A good edit has the new color, keeps the lines and still looks like the object.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

import janusflow_jax
from janusflow_jax import cli
from janusflow_jax.eval import sheet
from janusflow_jax.openmoji import judge as judge_lib, prompts, scores, suite
from janusflow_jax.openmoji.scores import Label

SEED = 1000
COLUMNS = 8
"""Of the sheet."""


def main(argv: list[str] | None = None) -> None:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--model", default="runs/emoji")
    p.add_argument("--data", default="data/openmoji")
    p.add_argument("--count", type=int, default=48, help="drawings; default 48")
    p.add_argument("--sheet", default="docs/editing.png")
    args = p.parse_args(argv)
    model = janusflow_jax.load(args.model)
    refs, judge = suite.references(args.data), judge_lib.load(judge_lib.START)
    pairs = recolorings(refs.unseen, args.count)
    images = [refs.unseen[source] for source, _ in pairs]
    texts, sources = (
        [prompts.caption(x.color, x.name) for x in side]
        for side in (
            [target for _, target in pairs],
            [source for source, _ in pairs],
        )
    )
    described = model.describe(images)
    named = [
        scores.parse_caption(x) == source for x, (source, _) in zip(described, pairs, strict=True)
    ]
    print(f"{len(pairs)} drawings; the model names {sum(named)} of them right", flush=True)
    options: dict[str, Any] = {"seed": SEED, "output": "numpy"}
    ways: dict[str, Callable[[], Any]] = {
        "unchanged": lambda: np.stack(images),
        "generated from the prompt alone": lambda: model.generate(texts, **options),
        **{
            f"vary, strength {s}": lambda s=s: model.vary(images, texts, strength=s, **options)
            for s in (0.9, 0.8, 0.6, 0.4)
        },
        "edit": lambda: model.edit(images, texts, sources=described, **options),
        "edit, the source's true prompt": lambda: model.edit(
            images, texts, sources=sources, **options
        ),
        "edit, 15 steps": lambda: model.edit(
            images, texts, sources=described, num_steps=15, **options
        ),
        "edit, strength 0.8": lambda: model.edit(
            images, texts, sources=described, strength=0.8, **options
        ),
    }
    print("| way | right hue | lines kept | looks like the prompt | median rank |")
    print("| --- | --- | --- | --- | --- |")
    rows: dict[str, np.ndarray] = {}
    for name, way in ways.items():
        rows[name] = way()
        print(f"| {name} | {row(rows[name], images, pairs, refs, judge)} |", flush=True)
    shown = ["unchanged", "generated from the prompt alone", "vary, strength 0.8", "edit"]
    labels = described[:COLUMNS] + texts[:COLUMNS] * 3
    grid = [rows[name][i] for name in shown for i in range(COLUMNS)]
    sheet.save(sheet.image_grid(grid, labels, COLUMNS), args.sheet)
    print(f"{args.sheet}; its rows: {'; '.join(shown)}")


def recolorings(unseen: dict[Label, np.ndarray], count: int) -> list[tuple[Label, Label]]:
    """Pairs of a drawing and the same object in another color that training saw."""
    generator = np.random.default_rng(0)
    labels = sorted(unseen)
    by_name: dict[str, list[Label]] = {}
    for label in labels:
        by_name.setdefault(label.name, []).append(label)
    out = []
    for i in generator.permutation(len(labels)):
        others = [x for x in by_name[labels[i].name] if x != labels[i]]
        if others and len(out) < count:
            out.append((labels[i], others[int(generator.integers(len(others)))]))
    return out


def row(
    got: np.ndarray,
    images: Sequence[np.ndarray],
    pairs: Sequence[tuple[Label, Label]],
    refs: suite.References,
    judge: judge_lib.LoadedJudge,
) -> str:
    """The scores of a way, as cells of the table."""
    targets = [target for _, target in pairs]
    scored = suite.score_images(list(got), targets, refs, judge)
    overlap = np.mean([ink_overlap(a, b) for a, b in zip(got, images, strict=True)])
    alignment = scored["alignment"]["likeness"]["score"]
    hue, rank = scored["hue"], scored["retrieval"]["median_rank"]
    return f"{hue['right']} of {hue['of']} | {overlap:.2f} | {alignment:.3f} | {rank:g}"


def ink_overlap(a: np.ndarray, b: np.ndarray) -> float:
    """Intersection over union of what is not white in two images."""
    first, second = (x.min(-1) < 230 for x in (a, b))
    return float((first & second).sum() / max((first | second).sum(), 1))


if __name__ == "__main__":
    cli.run(main)
