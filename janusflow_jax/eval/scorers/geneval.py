"""GenEval: the rules over an object detector's boxes, and the summary of its results file.

The detector and the color classifier run elsewhere (djghosh13/geneval); their rules are here, so
that a results file can be checked and summarized.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from janusflow_jax.eval import stats

POSITION_MARGIN = 0.1
"""Share of both sizes by which an offset must exceed 0."""

Boxes = Float[np.ndarray, "_ 5"]
"""x0, y0, x1, y1 in pixels, and the detector's confidence."""


def relative_position(box: Float[np.ndarray, "4"], target: Float[np.ndarray, "4"]) -> set[str]:
    """Where a box is, seen from a target: left of, right of, above, below; none if they overlap.

    The offset of the centers is shortened by `POSITION_MARGIN` of both sizes on each axis, and then
    divided by the length of the whole offset; a direction counts above 0.5.
    """
    corners = np.asarray([box, target]).reshape(2, 2, 2)
    (center, target_center), sizes = corners.mean(1), np.abs(np.diff(corners, axis=1))[:, 0]
    offset = center - target_center
    margin = POSITION_MARGIN * sizes.sum(0)
    shortened = np.maximum(np.abs(offset) - margin, 0) * np.sign(offset)
    if np.all(np.abs(shortened) < 1e-3):
        return set()
    dx, dy = shortened / np.linalg.norm(offset)
    directions = {"left of": -dx, "right of": dx, "above": -dy, "below": dy}
    return {name for name, share in directions.items() if share > 0.5}


def evaluate(
    objects: Mapping[str, Boxes],
    metadata: Mapping[str, Any],
    colors: Callable[[str, Boxes], Sequence[str]],
) -> list[str]:
    """Why an image is wrong; an empty list if it is right.

    Every `include` clause takes the `count` most confident boxes of its class; a position must hold
    for every pair of boxes. Any `exclude` clause makes the image wrong.

    Args:
      objects: the boxes that count, by class, the most confident first.
      metadata: a line of evaluation_metadata.jsonl.
      colors: (class, its boxes) -> the color of each box.
    Returns:
      One of 'count', 'color', 'no target', 'position' for a clause of `include` that fails, and
      'exclude' for each of `exclude`.
    """
    wrong, matched = [], []
    for clause in metadata.get("include", ()):
        own = objects.get(clause["class"], np.zeros((0, 5)))[: clause["count"]]
        problem = _problem(clause, own, matched, colors)
        wrong += [problem] if problem else []
        matched.append(None if problem else own)
    for clause in metadata.get("exclude", ()):
        if len(objects.get(clause["class"], ())) >= clause["count"]:
            wrong.append("exclude")
    return wrong


def _problem(
    clause: Mapping[str, Any],
    own: Boxes,
    matched: Sequence[Boxes | None],
    colors: Callable[[str, Boxes], Sequence[str]],
) -> str:
    if len(own) < clause["count"]:
        return "count"
    if "color" in clause:
        if list(colors(clause["class"], own)).count(clause["color"]) < clause["count"]:
            return "color"
    if "position" in clause:
        relation, index = clause["position"]
        targets = matched[index]
        if targets is None:
            return "no target"
        pairs = ((box[:4], target[:4]) for box in own for target in targets)
        if any(relation not in relative_position(*pair) for pair in pairs):
            return "position"
    return ""


def summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, stats.Score]:
    """Scores in percent of the lines of results.jsonl.

    Returns:
      overall: the unweighted mean of the tasks, GenEval's number; each task (a tag) by its name;
      images: share of right images; prompts: share of prompts with any right image.
    """
    right = [100.0 * row["correct"] for row in rows]
    prompts, tags = [row["metadata"] for row in rows], [row["tag"] for row in rows]
    best: dict[str, float] = {}
    for prompt, value in zip(prompts, right, strict=True):
        best[prompt] = max(best.get(prompt, 0.0), value)
    tasks = stats.by_category([value / 100 for value in right], tags, prompts)
    images = tasks.pop("overall")
    return {
        "overall": stats.score(right, groups=prompts, strata=tags),
        **tasks,
        "images": images,
        "prompts": stats.score([*best.values()]),
    }


def contradictions(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """File names in results.jsonl whose verdict does not follow from their stored boxes.

    The file stores no colors, so a clause with a color is only checked for its boxes.
    """
    out = []
    for row in rows:
        metadata = json.loads(row["metadata"])
        boxes = {name: np.asarray(own) for name, own in json.loads(row["details"]).items()}
        clauses = metadata.get("include", [])
        colorless = [{k: v for k, v in clause.items() if k != "color"} for clause in clauses]
        right = not evaluate(boxes, {**metadata, "include": colorless}, lambda *_: [])
        if row["correct"] and not right or not row["correct"] and right and clauses == colorless:
            out.append(str(row["filename"]))
    return out
