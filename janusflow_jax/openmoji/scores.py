"""Scores of the quick start: hue, retrieval of the right drawing, captions.

NumPy and strings only; nothing was fitted to the output of a model. Every score stands beside
the score of the same images or answers with the prompts shuffled, and their difference has a 95 %
interval (`stats.compare`).
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageFilter

from janusflow_jax.config.errors import JanusFlowError
from janusflow_jax.openmoji import prompts, stats

HUE_TOLERANCE = 30.0
"""Largest distance in degrees of the dominant hue from the prompt's."""

GRID = 20
"""Side of the grid on which silhouettes and colors are compared."""

_INK = 0.2  # a pixel this far from white, in any channel, belongs to the drawing
_SPREADS = 2.4  # half the side of the compared square, in standard deviations of the ink
_ARTICLES = frozenset(("a", "an", "the"))
_FRAMES = (["drawing", "of"], ["picture", "of"])


@dataclasses.dataclass(frozen=True, order=True)
class Label:
    """What an image shows, or should show."""

    name: str  # class
    color: str  # a key of prompts.PALETTE

    def __str__(self) -> str:
        return f"{self.color} {self.name}"


# --- hue


def dominant_hue(image: UInt8[np.ndarray, "H W 3"]) -> float:
    """The hue in degrees around which most color lies; NaN for an image without color.

    Every pixel is weighted by its chroma (largest minus smallest channel). The result is the
    circular mean in the window of about 30 degrees with the largest sum of weights.
    """
    rgb = image.reshape(-1, 3).astype(np.float64) / 255
    high, chroma = rgb.max(1), np.ptp(rgb, axis=1)
    rgb, high, chroma = (x[chroma > 0.2] for x in (rgb, high, chroma))
    if not len(rgb):
        return float("nan")
    red, green, blue = rgb.T
    sixth = np.select(
        [high == red, high == green],
        [(green - blue) / chroma, (blue - red) / chroma + 2],
        (red - green) / chroma + 4,
    )
    hue = sixth * 60 % 360
    bins = np.bincount(hue.astype(int) % 360, weights=chroma, minlength=360)
    windows = sum(np.roll(bins, shift) for shift in range(-15, 16))
    near = hue_distance(hue, float(np.argmax(windows)) + 0.5) <= 15.5
    mean = np.exp(1j * np.deg2rad(hue[near])) @ chroma[near]
    return float(np.rad2deg(np.angle(mean)) % 360)


def hue_distance(a: Any, b: Any) -> Any:
    """Degrees between hues, 0 to 180. NaN stays NaN."""
    return np.abs((np.asarray(a) - b + 180) % 360 - 180)


def score_hues(images: Sequence[np.ndarray], targets: Sequence[Label]) -> dict[str, Any]:
    """Compares dominant hues with the prompts' hues.

    Args:
      images: uint8[H, W, 3] each.
      targets: what each should show.
    Returns:
      right: number of images within HUE_TOLERANCE; of; nearest: number of images nearer to their
      prompt's color than to any other of the palette (harder: neighbors are 24 degrees apart);
      within: right against shuffled prompts; hues: one per image, None without color; right_each.
    """
    hues = np.asarray([dominant_hue(x) for x in images])
    palette = np.asarray(list(prompts.PALETTE.values()), np.float64)
    expected = np.asarray([prompts.PALETTE[t.color] for t in targets], np.float64)
    within = hue_distance(hues[:, None], expected[None]) <= HUE_TOLERANCE  # False for NaN
    nearest = palette[hue_distance(hues[:, None], palette[None]).argmin(1)] == expected
    nearest &= np.isfinite(hues)
    right = np.diagonal(within)
    return {
        "right": int(right.sum()),
        "of": len(hues),
        "nearest": int(nearest.sum()),
        "within": stats.compare(*stats.against_others(within.astype(float))),
        "hues": [None if np.isnan(h) else round(float(h), 1) for h in hues],
        "right_each": right.tolist(),
    }


# --- retrieval


def describe(image: UInt8[np.ndarray, "H W 3"]) -> Float[np.ndarray, " F"]:
    """Silhouette and colors on a grid, independent of the drawing's position and size.

    A square around the drawing, as large as its spread (moments: a speck changes them little), is
    averaged to GRID x GRID cells: the share of ink in the cell, and its darkness per channel. Both
    parts are centered and have length 1, so an inner product of two descriptions adds two
    correlations.
    """
    dark = 1 - image.astype(np.float32) / 255
    smooth = Image.fromarray(image).filter(ImageFilter.BoxBlur(1))
    ink = (255 - np.asarray(smooth).min(-1) > _INK * 255).astype(np.float32)
    if not ink.any():
        ink = np.ones_like(ink)  # an empty image is compared as a whole
    (y, spread_y), (x, spread_x) = _moments(ink.sum(1)), _moments(ink.sum(0))
    half = _SPREADS * max(spread_y, spread_x) + 1
    box = (x - half, y - half, x + half, y + half)
    cells = np.stack([_resample(plane, box) for plane in (ink, *np.moveaxis(dark, -1, 0))])
    return np.concatenate([_unit(cells[:1].ravel()), _unit(cells[1:].ravel())])


def _moments(mass: np.ndarray) -> tuple[float, float]:
    """Mean position and standard deviation of mass along a side, in pixels."""
    at = np.arange(len(mass)) + 0.5
    mean = float(mass @ at / mass.sum())
    return mean, float(np.sqrt(mass @ (at - mean) ** 2 / mass.sum()))


def _resample(plane: np.ndarray, box: tuple[float, float, float, float]) -> np.ndarray:
    """A box of a plane, zero outside the plane, averaged to the grid."""
    pad = 2 * max(plane.shape)
    left, top, right, bottom = (x + pad for x in box)
    image = Image.fromarray(np.pad(plane, pad))
    box = (left, top, right, bottom)
    return np.asarray(image.resize((GRID, GRID), Image.Resampling.BOX, box=box))


def _unit(x: np.ndarray) -> np.ndarray:
    x = x - x.mean()
    return x / max(float(np.linalg.norm(x)), 1e-6)


@dataclasses.dataclass(frozen=True)
class Gallery:
    """Descriptions of the reference drawings."""

    features: np.ndarray  # float32[M, F]
    labels: tuple[Label, ...]


def make_gallery(images: Sequence[np.ndarray], labels: Sequence[Label]) -> Gallery:
    """Describes reference images (uint8[H, W, 3]), the same number of every label.

    More views of one drawing would be more chances to be near. If labels have different numbers of
    images, the first ones of each are used.
    """
    views = min(Counter(labels).values())
    seen: Counter[Label] = Counter()
    used = []
    for i, label in enumerate(labels):
        seen[label] += 1
        if seen[label] <= views:
            used.append(i)
    features = np.stack([describe(images[i]) for i in used])
    return Gallery(features, tuple(labels[i] for i in used))


def ranks(
    images: Sequence[np.ndarray], targets: Sequence[Label], gallery: Gallery
) -> tuple[Float[np.ndarray, "N T"], list[int]]:
    """Rank of each target's drawing among the gallery's classes, by similarity to each image.

    The candidates for a target are all drawings *in the target's color*, one per class (its nearest
    view). So the requested color gives no help; silhouette and inner colors decide.

    Args:
      images: N of uint8[H, W, 3].
      targets: T, each in the gallery.
    Returns:
      float[N, T], 1 for the most similar (ties count half); and each target's number of candidates.
    Raises:
      JanusFlowError: the gallery has no drawing of a target (lists all).
    """
    if missing := sorted({str(t) for t in targets if t not in gallery.labels}):
        raise JanusFlowError(
            f"--data: expected drawings of every prompt; got none of {missing}: use the data of "
            "tools/prepare_openmoji.py without --new-classes"
        )
    features = np.stack([describe(x) for x in images])
    distance = -features @ gallery.features.T
    out, candidates = np.zeros((len(images), len(targets))), []
    for j, target in enumerate(targets):
        columns: dict[str, list[int]] = {}  # the views of each class in the target's color
        for m, label in enumerate(gallery.labels):
            if label.color == target.color:
                columns.setdefault(label.name, []).append(m)
        best = np.stack([distance[:, views].min(1) for views in columns.values()], axis=1)
        own = distance[:, columns[target.name]].min(1, keepdims=True)
        out[:, j] = 0.5 + (best < own).sum(1) + 0.5 * (best == own).sum(1)
        candidates.append(len(columns))
    return out, candidates


def score_retrieval(
    images: Sequence[np.ndarray], targets: Sequence[Label], gallery: Gallery
) -> dict[str, Any]:
    """Retrieval of the prompts' drawings, against shuffled prompts.

    Returns:
      candidates: the smallest number of drawings in a target's color; of: number of images; top1,
      top5, top10: numbers of images; median_rank; ranks: one per image; against shuffled prompts:
      `percentile` (share of the other candidates that are less similar; 0.5 is chance) and
      `reciprocal_rank`.
    """
    table, candidates = ranks(images, targets, gallery)
    own = np.diagonal(table)
    percentile = 1 - (table - 1) / (np.asarray(candidates) - 1)
    return {
        "candidates": min(candidates),
        "of": len(own),
        **{f"top{k}": int((own <= k).sum()) for k in (1, 5, 10)},
        "median_rank": float(np.median(own)),
        "percentile": stats.compare(*stats.against_others(percentile)),
        "reciprocal_rank": stats.compare(*stats.against_others(1 / table)),
        "ranks": own.tolist(),
    }


# --- captions


def words(text: str) -> list[str]:
    """The words of a caption in lower case, without articles and without a leading 'drawing of'.

    That frame is not part of the answer: it alone would be half of the words of two captions.
    """
    out = [w for w in re.findall(r"[a-z0-9'-]+", text.lower()) if w not in _ARTICLES]
    return out[2:] if out[:2] in _FRAMES else out


def parse_caption(text: str) -> Label:
    """Color word and class of a caption: 'A drawing of a red race car.' -> ('race car', 'red').

    '' for what it does not name. The class is everything after the color: 'red car' is not a part
    of 'red race car'.
    """
    first, *rest = words(text) or [""]
    if first in prompts.PALETTE:
        return Label(" ".join(rest), first)
    return Label(" ".join([first, *rest]), "")


def word_overlap(a: Sequence[str], b: Sequence[str]) -> Float[np.ndarray, "A B"]:
    """F1 of the words of every pair of captions: 1 for the same words, 0 for none in common."""
    left, right = [frozenset(words(t)) for t in a], [frozenset(words(t)) for t in b]
    return np.asarray(
        [[2 * len(x & y) / (len(x) + len(y)) if x or y else 1.0 for y in right] for x in left],
        np.float64,
    )


def edit_similarity(a: Sequence[str], b: Sequence[str]) -> Float[np.ndarray, "A B"]:
    """1 - (edit distance) / (letters of the longer caption) of every pair, on their `words`.

    The dynamic program of the Levenshtein distance runs for all pairs at once, letter by letter of
    `a`.
    """
    texts = [[" ".join(words(t)) for t in side] for side in (a, b)]
    # letters as numbers, [A, longest] and [B, longest]; 0 after the end
    x, y = (np.array(side).view(np.uint32).reshape(len(side), -1) for side in texts)
    size_x, size_y = ((letters > 0).sum(1)[:, None] for letters in (x, y))
    steps = np.arange(y.shape[1] + 1)
    row = np.broadcast_to(steps, (len(x), len(y), len(steps)))  # distances to each start of b
    for i in range(x.shape[1]):
        new = row + 1
        change = row[..., :-1] + (x[:, None, i, None] != y)
        new[..., 1:] = np.minimum(new[..., 1:], change)
        new = np.minimum.accumulate(new - steps, axis=-1) + steps  # insertions
        row = np.where(i < size_x[..., None], new, row)
    distance = np.take_along_axis(row, size_y[None], axis=2)[..., 0]
    return 1 - distance / np.maximum(np.maximum(size_x, size_y.T), 1)


def best_of(
    scores: Float[np.ndarray, "A T"], groups: Sequence[Sequence[str]]
) -> Float[np.ndarray, "A N"]:
    """The best score in each group of true captions; groups are side by side in `scores`."""
    ends = np.cumsum([len(g) for g in groups])
    return np.stack([part.max(1) for part in np.split(scores, ends[:-1], axis=1)], axis=1)


def caption_table(
    answers: Sequence[str], captions: Sequence[Sequence[str]], labels: Sequence[Label]
) -> dict[str, np.ndarray]:
    """Every answer against every image, in [0, 1]: a table float[N answers, N images] of each kind.

    Kinds: exact (equal to a true caption), color, name (class), words (F1) and edits (share of
    letters that need no change) of the nearest true caption.
    """
    parsed = [parse_caption(a) for a in answers]
    exact = [[a.strip() in group for group in captions] for a in answers]
    flat = [caption for group in captions for caption in group]
    return {
        "exact": np.asarray(exact, np.float64),
        "color": np.asarray([[p.color == x.color for x in labels] for p in parsed], np.float64),
        "name": np.asarray([[p.name == x.name for x in labels] for p in parsed], np.float64),
        "words": best_of(word_overlap(answers, flat), captions),
        "edits": best_of(edit_similarity(answers, flat), captions),
    }


def score_captions(
    answers: Sequence[str], captions: Sequence[Sequence[str]], labels: Sequence[Label]
) -> dict[str, Any]:
    """Compares answers to 'what is in the image' with the true captions.

    Args:
      answers: the model's answer for each image.
      captions: the true captions of each.
      labels: what each shows.
    Returns:
      for every kind of `caption_table`: `right` (answers with score 1); `mean` score; `constant`
      (compared with the single answer that scores best on these images); `shuffled` (compared with
      the same answers shuffled among the images). Intervals resample whole classes.
    """
    groups = [x.name for x in labels]
    # The best constant answer for color, class or both is the caption of one of the images.
    constants = list(dict.fromkeys(c[0] for c in captions))
    constant_tables = caption_table(constants, captions, labels)
    out: dict[str, Any] = {"of": len(answers)}
    for kind, table in caption_table(answers, captions, labels).items():
        best = int(constant_tables[kind].mean(1).argmax())
        own, others = stats.against_others(table)
        out[kind] = {
            "right": int((own == 1).sum()),
            "mean": float(own.mean()),
            "constant": {
                "answer": constants[best],
                **stats.compare(own, constant_tables[kind][best], groups),
            },
            "shuffled": stats.compare(own, others, groups),
        }
    return out
