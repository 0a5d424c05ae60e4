"""The suite `emoji`: generates and captions images with a model, and scores both.

Every score stands beside its baseline, with a 95 % interval of the difference if items can be
paired. Results are plain JSON values.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from janusflow_jax import pipeline
from janusflow_jax.config import SourceConfig
from janusflow_jax.data import images as images_lib, sources
from janusflow_jax.eval import previews, sheet
from janusflow_jax.openmoji import judge as judge_lib, prompts, scores
from janusflow_jax.openmoji.judge import LoadedJudge
from janusflow_jax.openmoji.scores import Label

CAPTION_SPLITS = ("heldout_pairs", "heldout_views", "train")
MIN_RIGHT_HUES = 16
"""Images of the sheet (of 24) that must have the right hue."""
MORE_SEED = 1000
"""Added to the seed of the extra prompts, so that their noise is not that of the sheet."""


# --- data


@dataclasses.dataclass(frozen=True)
class References:
    """What generated images are compared with."""

    gallery: scores.Gallery  # a drawing of every (class, color) pair
    trained: list[Label]  # the pairs that are trained, sorted
    drawings: judge_lib.Drawings


@functools.cache
def references(path: str) -> References:
    """The reference drawings of a prepared data set, read once."""
    images, labels = [], []
    views: dict[Label, list[np.ndarray]] = {}
    trained, unseen = set(), {}
    for split in ("train", "heldout_pairs", "heldout_views"):
        source = sources.open_source(path, split)
        for i in range(len(source)):
            record = source[i]
            label = Label(record["class"], record["colour"])
            image = images_lib.decode(record["image"])
            if split == "heldout_views":
                unseen.setdefault(label, image)
                continue
            images.append(image)
            labels.append(label)
            views.setdefault(label, []).append(image)
            if split == "train":
                trained.add(label)
    gallery = scores.make_gallery(images, labels)
    return References(gallery, sorted(trained), judge_lib.Drawings(views, unseen))


def sample_labels(
    labels: Sequence[Label], count: int, seed: int, exclude: Sequence[Label]
) -> list[Label]:
    """Labels drawn without repetition, without those of `exclude`."""
    rest = [x for x in labels if x not in set(exclude)]
    order = np.random.default_rng(seed).permutation(len(rest))
    return [rest[i] for i in order[:count]]


# --- scores


def score_generation(
    model: pipeline.Pipeline,
    refs: References,
    judge: LoadedJudge | None,
    *,
    count: int,
    guidance_scale: float,
    num_steps: int,
    seed: int,
    sheet_file: pathlib.Path,
) -> dict[str, Any]:
    """Generates the sheet and `count` more trained pairs, and scores both.

    Args: sheet_file: where the sheet goes, PNG.
    Returns: the report's parts `sheet` and `trained_pairs`.
    Raises: JanusFlowError: nothing could be scored: too few trained pairs, a prompt without drawing
      or unknown to the judge, another image size. Raised before anything is generated.
    """
    of_sheet = [Label(name, color) for color, name, _ in prompts.SHEET]
    more = sample_labels(refs.trained, count, seed, exclude=of_sheet)
    no_distance = judge_lib.too_few(more, refs.drawings) if judge else ""
    if no_distance:
        print(f"no Frechet distance: {no_distance}", flush=True)
    # Score black images first: whatever prevents a score raises here, not after minutes.
    black = np.zeros((model.cfg.image_size, model.cfg.image_size, 3), np.uint8)
    for labels in (of_sheet, more):
        score_images([black] * len(labels), labels, refs, judge)

    def generate(labels: Sequence[Label], seed: int) -> list[np.ndarray]:
        texts = [prompts.caption(x.color, x.name) for x in labels]
        settings = {"guidance_scale": guidance_scale, "num_steps": num_steps, "output": "numpy"}
        return list(model.generate(texts, seed=seed, **settings))

    images = generate(of_sheet, seed)
    sheet.image_grid(images, prompts.PROMPTS).save(sheet_file)
    print(f"the sheet: {sheet_file}", flush=True)
    more_images = generate(more, seed + MORE_SEED)
    out = {
        "sheet": score_images(images, of_sheet, refs, judge),
        "trained_pairs": score_images(more_images, more, refs, judge),
    }
    for row, (_, _, trained) in zip(out["sheet"]["pictures"], prompts.SHEET, strict=True):
        row["trained"] = trained
    if no_distance:
        out["trained_pairs"]["frechet_left_out"] = no_distance
    elif judge:
        frechet = judge_lib.score_frechet(judge, more_images, more, refs.drawings)
        out["trained_pairs"]["frechet"] = frechet
    return out


def score_images(
    images: Sequence[np.ndarray],
    labels: Sequence[Label],
    refs: References,
    judge: LoadedJudge | None,
) -> dict[str, Any]:
    """Hue, retrieval and alignment of images, uint8[H, W, 3] each; a row for each in `pictures`."""
    hue = scores.score_hues(images, labels)
    retrieval = scores.score_retrieval(images, labels, refs.gallery)
    rows = zip(hue.pop("hues"), hue.pop("right_each"), retrieval.pop("ranks"), labels, strict=True)
    out = {
        "hue": hue,
        "retrieval": retrieval,
        "pictures": [
            {"hue": h, "hue_right": right, "rank": r, "prompt": prompts.caption(x.color, x.name)}
            for h, right, r, x in rows
        ],
    }
    if judge:
        out["alignment"] = judge_lib.score_alignment(judge, images, labels, refs.drawings)
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


# --- what a report shows


def verdicts(report: dict[str, Any]) -> list[dict[str, Any]]:
    """One row per claim: what, result, the comparison if there is one, and whether it holds."""
    out: list[dict[str, Any]] = []

    def claim(what: str, result: str, comparison: dict[str, Any]) -> None:
        holds = {"holds": comparison["beats"]} if "beats" in comparison else {}
        out.append({"what": what, "result": result, **comparison, **holds})

    if "sheet" in report:
        hue = report["sheet"]["hue"]
        unseen = [x["hue_right"] for x in report["sheet"]["pictures"] if not x["trained"]]
        claim(
            f"sheet: hue within {scores.HUE_TOLERANCE:.0f} degrees, {MIN_RIGHT_HUES} wanted",
            f"{hue['right']}/{hue['of']} (untrained pairs {sum(unseen)}/{len(unseen)})",
            {"holds": hue["right"] >= MIN_RIGHT_HUES},
        )
    for part in ("sheet", "trained_pairs"):
        if part not in report:
            continue
        name, result = part.replace("_", " "), report[part]
        hue, retrieval = result["hue"], result["retrieval"]
        claim(
            f"{name}: hue, against shuffled prompts", f"{hue['right']}/{hue['of']}", hue["within"]
        )
        among = f"{name}: drawing among {retrieval['candidates']}, against shuffled"
        claim(
            f"{among}, reciprocal rank",
            f"top1 {retrieval['top1']}, top5 {retrieval['top5']} of {retrieval['of']}",
            retrieval["reciprocal_rank"],
        )
        claim(
            f"{among}, percentile",
            f"median rank {retrieval['median_rank']:g}",
            retrieval["percentile"],
        )
        if fit := result.get("alignment"):
            claim(
                f"{name}: judge's alignment, against shuffled prompts",
                f"top1 {fit['top1']}/{fit['of']} (drawings {fit['drawn_top1']})",
                fit["likeness"],
            )
            claim(
                f"{name}: judge's alignment, against other classes in the prompt's color",
                f"median rank {fit['median_rank']:g} of {fit['candidates']}",
                fit["in_colour"],
            )
        if distance := result.get("frechet"):
            # Distances have no pairs to compare. Nothing generated at this size comes near the
            # distance of real drawings, not even of other prompts: both stand beside it.
            claim(
                f"{name}: judge's Frechet distance (not FID), against noise",
                f"{distance['painted']:.3f} against {distance['noise']:.3f} (drawings "
                f"{distance['drawn']:.3f}, of other prompts {distance['other_prompts']:.3f})",
                {"holds": distance["painted"] < distance["noise"]},
            )
    for split, captions in report.get("captions", {}).items():
        for kind in scores.KINDS:
            for baseline in ("constant", "shuffled"):
                claim(
                    f"captions {split.replace('_', ' ')}: {kind}, against {baseline}",
                    f"{captions[kind]['right']}/{captions['of']}",
                    captions[kind][baseline],
                )
    return out


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The verdicts as text with aligned columns."""
    cells = [["", "result", "score", "baseline", "difference, 95 % interval", ""]]
    for x in rows:
        numbers = ["", "", ""]
        if "difference" in x:
            interval = f"{x['difference']:+.3f}  {x['low']:+.3f} .. {x['high']:+.3f}"
            numbers = [f"{x['score']:.3f}", f"{x['baseline']:.3f}", interval]
        cells.append([x["what"], x["result"], *numbers, "yes" if x["holds"] else "NO"])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = (map(str.ljust, row, widths) for row in cells)
    return "\n".join("  ".join(line).rstrip() for line in lines)
