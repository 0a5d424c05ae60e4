"""A small GenEval for models of the quick start: its prompts, and a detector for its drawings.

The judge says which class an image shows, and the dominant hue says its color. GenEval's own rules
decide and its own files carry the result, so the command `benchmark geneval` runs from end to end
without the official detector. The score is not GenEval's.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import UInt8

from janusflow_jax.config.errors import DataError
from janusflow_jax.data import images as images_lib
from janusflow_jax.eval.scorers import geneval
from janusflow_jax.openmoji import prompts, scores
from janusflow_jax.openmoji.judge import LoadedJudge


def metadata() -> list[dict[str, Any]]:
    """The prompts of the sheet as lines of evaluation_metadata.jsonl; the two tasks are whether
    training sees a pair of class and color."""
    return [
        {
            "tag": "trained_pair" if trained else "new_pair",
            "include": [{"class": name, "count": 1, "color": color}],
            "prompt": prompts.caption(color, name),
        }
        for color, name, trained in prompts.SHEET
    ]


def color_of(image: UInt8[np.ndarray, "H W 3"]) -> str:
    """The color of the palette that is nearest to the dominant hue; '' if none is near."""
    hue = scores.dominant_hue(image)
    if np.isnan(hue):
        return ""
    distance = {name: scores.hue_distance(hue, own) for name, own in prompts.PALETTE.items()}
    nearest = min(distance, key=lambda name: distance[name])
    return nearest if distance[nearest] <= scores.HUE_TOLERANCE else ""


def detect(judge: LoadedJudge, folder: epath.Path) -> Iterator[dict[str, Any]]:
    """Lines of results.jsonl for the images that `benchmark geneval` wrote.

    The detector finds one object, the class whose text is nearest, in the whole image.

    Args: folder: `images/` of the run.
    Raises:
      DataError: no images.
    """
    files = sorted(folder.glob("*/samples/*.png"), key=str)
    if not files:
        raise DataError(f"{folder}: expected the images of a run of geneval; got none")
    images = [images_lib.decode(file.read_bytes()) for file in files]
    cosines = judge.embed_images(images) @ judge.embed_texts(judge.cfg.labels).T
    for file, image, nearest in zip(files, images, cosines.argmax(1), strict=True):
        record = json.loads((file.parent.parent / "metadata.jsonl").read_text())
        height, width = image.shape[:2]
        objects = {judge.cfg.labels[nearest].name: np.asarray([[0, 0, width, height, 1.0]])}
        color = color_of(image)
        wrong = geneval.evaluate(objects, record, lambda _, boxes: [color] * len(boxes))  # noqa: B023
        yield {
            "filename": str(file),
            "tag": record["tag"],
            "prompt": record["prompt"],
            "correct": not wrong,
            "reason": ", ".join(wrong),
            "metadata": json.dumps(record),
            "details": json.dumps({name: boxes.tolist() for name, boxes in objects.items()}),
        }
