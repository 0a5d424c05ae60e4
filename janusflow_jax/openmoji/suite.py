"""The suite `emoji`: generates and captions images with a model, and scores both.

Every score stands beside its baseline, with a 95 % interval of the difference if items can be
paired. Results are plain JSON values.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from janusflow_jax import pipeline
from janusflow_jax.config import SourceConfig
from janusflow_jax.data import images as images_lib, sources
from janusflow_jax.eval import previews, sheet
from janusflow_jax.openmoji import judge as judge_lib, prompts, scores
from janusflow_jax.openmoji.judge import LoadedJudge
from janusflow_jax.openmoji.scores import Label

CAPTION_SPLITS = ("heldout_pairs", "heldout_views", "train")
MORE_SEED = 1000
"""Added to the seed of the extra prompts, so that their noise is not that of the sheet."""


@dataclasses.dataclass(frozen=True)
class References:
    """The real drawings that generated images are compared with, uint8[H, W, 3] each."""

    gallery: scores.Gallery  # of every (class, color) pair
    views: dict[Label, list[np.ndarray]]  # of every pair, those of the gallery among them
    unseen: dict[Label, np.ndarray]  # one more view of every trained pair


@functools.cache
def references(path: str) -> References:
    """The reference drawings of a prepared data set, read once."""
    images, labels = [], []
    views: dict[Label, list[np.ndarray]] = {}
    unseen: dict[Label, np.ndarray] = {}
    for split in ("train", "heldout_pairs", "heldout_views"):
        source = sources.open_source(path, split)
        for i in range(len(source)):
            record = source[i]
            label = Label(record["class"], record["colour"])
            image = images_lib.decode(record["image"])
            if split == "heldout_views":
                unseen[label] = image
            else:
                images.append(image)
                labels.append(label)
                views.setdefault(label, []).append(image)
    return References(scores.make_gallery(images, labels), views, unseen)


def score_generation(
    model: pipeline.Pipeline,
    refs: References,
    judge: LoadedJudge | None,
    *,
    count: int,
    guidance_scale: float,
    solver: Mapping[str, Any],
    seed: int,
    sheet_file: epath.PathLike,
) -> dict[str, Any]:
    """Generates the sheet and `count` more trained pairs, and scores both.

    Args:
      solver: arguments of `Pipeline.generate`, such as num_steps.
      sheet_file: where the sheet goes, PNG.
    Returns: the report's parts `sheet` and `trained_pairs`.
    Raises: JanusFlowError: nothing could be scored: too few trained pairs, a prompt without
      drawing, an image size that the judge does not know. Raised before anything is generated.
    """
    of_sheet = [Label(name, color) for color, name, _ in prompts.SHEET]
    others = sorted(refs.unseen.keys() - of_sheet)
    order = np.random.default_rng(seed).permutation(len(others))
    more = [others[i] for i in order[:count]]
    # Score black images first: whatever prevents a score raises now, not after minutes.
    black = np.zeros((model.cfg.image_size, model.cfg.image_size, 3), np.uint8)
    for labels in (of_sheet, more):
        score_images([black] * len(labels), labels, refs, judge)

    def generate(labels: Sequence[Label], seed: int) -> list[np.ndarray]:
        texts = [prompts.caption(x.color, x.name) for x in labels]
        options = {**solver, "guidance_scale": guidance_scale, "output": "numpy"}
        return list(model.generate(texts, seed=seed, **options))

    images = generate(of_sheet, seed)
    sheet.save(sheet.image_grid(images, prompts.PROMPTS), sheet_file)
    print(f"the sheet: {sheet_file}", flush=True)
    more_images = generate(more, seed + MORE_SEED)
    out = {
        "sheet": score_images(images, of_sheet, refs, judge),
        "trained_pairs": score_images(more_images, more, refs, judge),
    }
    for row, (_, _, trained) in zip(out["sheet"]["images"], prompts.SHEET, strict=True):
        row["trained"] = trained
    if judge and len(more) >= judge_lib.MIN_IMAGES:
        rest = sorted(refs.unseen.keys() - more)
        out["trained_pairs"]["frechet"] = judge_lib.score_frechet(
            judge,
            more_images,
            reference=[x for label in more for x in refs.views[label][:2]],
            drawn=[refs.unseen[x] for x in more],
            other_prompts=[refs.unseen[rest[i * len(rest) // len(more)]] for i in range(len(more))],
        )
    return out


def score_images(
    images: Sequence[np.ndarray],
    labels: Sequence[Label],
    refs: References,
    judge: LoadedJudge | None,
) -> dict[str, Any]:
    """Hue, retrieval and alignment of images, uint8[H, W, 3] each; a row for each in `images`."""
    hue = scores.score_hues(images, labels)
    retrieval = scores.score_retrieval(images, labels, refs.gallery)
    rows = zip(hue.pop("hues"), hue.pop("right_each"), retrieval.pop("ranks"), labels, strict=True)
    out = {
        "hue": hue,
        "retrieval": retrieval,
        "images": [
            {"hue": h, "hue_right": right, "rank": r, "prompt": prompts.caption(x.color, x.name)}
            for h, right, r, x in rows
        ],
    }
    if judge:
        drawings = [refs.views[x][0] for x in labels]
        out["alignment"] = judge_lib.score_alignment(judge, images, labels, drawings)
    return out


def score_captioning(model: pipeline.Pipeline, path: str, split: str, count: int) -> dict[str, Any]:
    """Captions `count` images of a split and scores the answers, which `answers` lists."""
    source = SourceConfig(name=split, path=path, split=split, task="understand", format="chat")
    lines = previews.caption_source(model, source, count)
    result = scores.score_captions(
        [x["answer"] for x in lines],
        [x["captions"] for x in lines],
        [Label(x["class"], x["colour"]) for x in lines],
    )
    return {**result, "answers": [{"id": x["id"], "answer": x["answer"]} for x in lines]}


def table(report: dict[str, Any]) -> str:
    """The scores of a report as text: counts, and every comparison with its baseline."""
    lines = [f"{'':44}{'score':>9}{'baseline':>10}  difference, 95 % interval"]

    def add(name: str, values: dict[str, Any]) -> None:
        if "beats" in values:
            form = "{score:9.3f}{baseline:10.3f}  {difference:+.3f}, {low:+.3f} .. {high:+.3f}"
            better = "better" if values["beats"] else "NOT better"
            lines.append(f"{name:44}{form.format(**values)}  {better}")
            return
        numbers = [f"{k} {v:.4g}" for k, v in values.items() if isinstance(v, int | float)]
        if numbers:
            lines.append(f"{name}: {', '.join(numbers)}")
        for key, value in values.items():
            if isinstance(value, dict):
                add(f"{name} {key}", value)

    for part in ("sheet", "trained_pairs", "captions"):
        add(part, report.get(part, {}))
    return "\n".join(lines)
