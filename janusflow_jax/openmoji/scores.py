"""The quick start's scores, on pictures as painted: hue, the right drawing, captions.

NumPy and strings only; nothing here was fitted to a model's output. Every score stands beside what
the same pictures or answers get with the prompts exchanged among them, and the difference has a
95 % interval (`stats.compare`).
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageFilter

from janusflow_jax.config.errors import JanusFlowError
from janusflow_jax.openmoji import partial, prompts as openmoji_prompts, stats

HUE_TOLERANCE = 30.0
"""Degrees that the dominant hue may lie from the prompt's."""

KINDS = ("exact", "colour", "name", "words", "edits")
"""How a caption is compared with the truth: whole, by part, and by nearness."""

GRID = 20
"""Side of the grid on which silhouettes and colours are compared."""

_INK = 0.2  # a pixel this far from white, in any channel, belongs to the drawing
_SPREADS = 2.4  # half the side that is compared, in standard deviations of the ink


@dataclasses.dataclass(frozen=True)
class Label:
    """What a picture shows, or should show."""

    name: str  # class
    colour: str  # a key of openmoji_sheet.PALETTE


# --- hue


def dominant_hue(picture: UInt8[np.ndarray, "H W 3"]) -> float:
    """The hue in degrees around which most colour lies; NaN where nothing is coloured.

    A pixel counts as much as it is coloured (largest minus smallest channel); the fullest window of
    30 degrees is found, and its circular mean taken.
    """
    rgb = picture.reshape(-1, 3).astype(np.float64) / 255
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
    turn = np.exp(1j * np.deg2rad(hue[near])) @ chroma[near]
    return float(np.rad2deg(np.angle(turn)) % 360)


def hue_distance(a: Any, b: Any) -> Any:
    """Degrees between hues, 0 to 180. NaN stays NaN."""
    return np.abs((np.asarray(a) - b + 180) % 360 - 180)


def score_hues(pictures: Sequence[np.ndarray], targets: Sequence[Label]) -> dict[str, Any]:
    """Dominant hues against the prompts'.

    Args:
      pictures: uint8[H, W, 3] each.
      targets: what each should show.
    Returns:
      right: how many lie within HUE_TOLERANCE; of; nearest: how many lie nearer to their prompt's
      colour than to any other of the palette (harder: neighbours are 24 degrees apart); against
      exchanged prompts: `within`; hues: per picture, None where nothing is coloured.
    """
    found = np.asarray([dominant_hue(p) for p in pictures])
    palette = np.asarray(list(openmoji_prompts.PALETTE.values()), np.float64)
    wanted = np.asarray([openmoji_prompts.PALETTE[t.colour] for t in targets], np.float64)
    within = hue_distance(found[:, None], wanted[None]) <= HUE_TOLERANCE  # False for NaN
    nearest = palette[hue_distance(found[:, None], palette[None]).argmin(1)] == wanted
    nearest &= np.isfinite(found)
    right = np.diagonal(within)
    return {
        "right": int(right.sum()),
        "of": len(found),
        "nearest": int(nearest.sum()),
        "within": stats.compare(*stats.against_others(within.astype(float))),
        "hues": [None if np.isnan(h) else round(float(h), 1) for h in found],
        "right_each": right.tolist(),
    }


# --- the right drawing among many


def describe(picture: UInt8[np.ndarray, "H W 3"]) -> Float[np.ndarray, " F"]:
    """Silhouette and colours on a grid, wherever and however large the drawing stands.

    A square about the drawing's centre, in proportion to its spread (moments: a speck moves them
    little), is averaged to GRID x GRID cells: how much of the cell is ink, and its darkness per
    channel. Both parts are centred and have length 1: their inner products add two correlations.
    """
    dark = 1 - picture.astype(np.float32) / 255
    smooth = Image.fromarray(picture).filter(ImageFilter.BoxBlur(1))
    ink = (255 - np.asarray(smooth).min(-1) > _INK * 255).astype(np.float32)
    if not ink.any():
        ink = np.ones_like(ink)  # an empty picture is compared as a whole
    rows, columns = ink.sum(1), ink.sum(0)
    (y, spread_y), (x, spread_x) = _moments(rows), _moments(columns)
    half = _SPREADS * max(spread_y, spread_x) + 1
    box = (x - half, y - half, x + half, y + half)
    planes = [ink, *np.moveaxis(dark, -1, 0)]
    cells = np.stack([_resample(plane, box) for plane in planes])
    return np.concatenate([_unit(cells[:1].ravel()), _unit(cells[1:].ravel())])


def _moments(mass: np.ndarray) -> tuple[float, float]:
    """Mean position and standard deviation of mass along a side, in pixels."""
    at = np.arange(len(mass)) + 0.5
    mean = float(mass @ at / mass.sum())
    return mean, float(np.sqrt(mass @ (at - mean) ** 2 / mass.sum()))


def _resample(plane: np.ndarray, box: tuple[float, float, float, float]) -> np.ndarray:
    """A box of a plane, zero outside the plane, averaged to the grid."""
    pad = 2 * max(plane.shape)
    image = Image.fromarray(np.pad(plane, pad))
    box = (box[0] + pad, box[1] + pad, box[2] + pad, box[3] + pad)
    return np.asarray(image.resize((GRID, GRID), Image.Resampling.BOX, box=box))


def _unit(x: np.ndarray) -> np.ndarray:
    x = x - x.mean()
    return x / max(float(np.linalg.norm(x)), 1e-6)


@dataclasses.dataclass(frozen=True)
class Gallery:
    """Reference drawings to find a picture among."""

    features: np.ndarray  # float32[M, F]
    labels: tuple[Label, ...]


def make_gallery(pictures: Sequence[np.ndarray], labels: Sequence[Label]) -> Gallery:
    """Describes reference pictures (uint8[H, W, 3] each), as many of every label.

    More views of one drawing would be more chances to be near: where the numbers differ, the first
    ones are kept.
    """
    counts = Counter(labels)
    if not counts or len(pictures) != len(labels):
        raise JanusFlowError(
            f"gallery: expected pictures and one label each; got {len(pictures)} and {len(labels)}"
        )
    views = min(counts.values())
    seen: Counter[Label] = Counter()
    kept = []
    for i, label in enumerate(labels):
        seen[label] += 1
        if seen[label] <= views:
            kept.append(i)
    features = np.stack([describe(pictures[i]) for i in kept])
    return Gallery(features, tuple(labels[i] for i in kept))


def ranks(
    pictures: Sequence[np.ndarray], targets: Sequence[Label], gallery: Gallery
) -> tuple[Float[np.ndarray, "N T"], list[int]]:
    """Where each target's drawing stands among the gallery's classes, by likeness to each picture.

    The candidates for a target are all drawings *in the target's colour*, one a class (its nearest
    view): the colour asked for gives no help, silhouette and inner colours decide.

    Args:
      pictures: N of uint8[H, W, 3].
      targets: T, each in the gallery.
    Returns:
      float[N, T], 1 for the most alike (ties count half); and the candidates of each target.
    Raises:
      JanusFlowError: a target that the gallery lacks (lists all).
    """
    lacking = sorted({f"{t.colour} {t.name}" for t in targets} - _names(gallery))
    if lacking:
        raise JanusFlowError(
            f"gallery: expected a reference picture of each target; got none {lacking}"
        )
    features = np.stack([describe(p) for p in pictures])
    distance = -features @ gallery.features.T
    out, candidates = np.zeros((len(pictures), len(targets))), []
    for j, target in enumerate(targets):
        classes = list(dict.fromkeys(x.name for x in gallery.labels if x.colour == target.colour))
        index = {name: i for i, name in enumerate(classes)}
        best = np.full((len(pictures), len(classes)), np.inf)
        for m, label in enumerate(gallery.labels):
            if label.colour == target.colour:
                column = best[:, index[label.name]]
                np.minimum(column, distance[:, m], out=column)
        own = best[:, [index[target.name]]]
        out[:, j] = 0.5 + (best < own).sum(1) + 0.5 * (best == own).sum(1)
        candidates.append(len(classes))
    return out, candidates


def _names(gallery: Gallery) -> set[str]:
    return {f"{x.colour} {x.name}" for x in gallery.labels}


def score_retrieval(
    pictures: Sequence[np.ndarray], targets: Sequence[Label], gallery: Gallery
) -> dict[str, Any]:
    """Retrieval of the prompts' drawings, against exchanged prompts.

    Returns:
      candidates: the fewest drawings that any target was sought among; top1, top5, top10: how many
      pictures; median_rank; ranks: per picture; against exchanged prompts: `percentile` (share of
      the other candidates that are less alike; 0.5 is chance) and `reciprocal_rank`.
    """
    table, candidates = ranks(pictures, targets, gallery)
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


def parse_caption(text: str) -> Label:
    """A caption's colour word and class: 'A drawing of a red race car.' -> ('race car', 'red').

    '' for what it does not name. The class is all that follows the colour, so that 'red car' is no
    part of 'red race car'.
    """
    words = partial.words(text)
    colour = words[0] if words and words[0] in openmoji_prompts.PALETTE else ""
    return Label(" ".join(words[1:] if colour else words), colour)


def caption_table(
    answers: Sequence[str], captions: Sequence[Sequence[str]], labels: Sequence[Label]
) -> dict[str, np.ndarray]:
    """Every answer against every picture's truth -> float[N answers, N] in [0, 1] of each KIND."""
    said = [parse_caption(a) for a in answers]
    exact = [[a.strip() in truth for truth in captions] for a in answers]
    truths = [t for truth in captions for t in truth]
    return {
        "exact": np.asarray(exact, np.float64),
        "colour": np.asarray([[s.colour == x.colour for x in labels] for s in said], np.float64),
        "name": np.asarray([[s.name == x.name for x in labels] for s in said], np.float64),
        "words": partial.best_of(partial.word_overlap(answers, truths), captions),
        "edits": partial.best_of(partial.edit_likeness(answers, truths), captions),
    }


def score_captions(
    answers: Sequence[str], captions: Sequence[Sequence[str]], labels: Sequence[Label]
) -> dict[str, Any]:
    """Answers to 'what is in the picture' against the truth.

    Args:
      answers: what the model said of each picture.
      captions: the true captions of each.
      labels: what each shows.
    Returns:
      for every KIND - exact (one of the captions, to the letter), colour, name (class), and in
      part: words (F1 of words), edits (share of letters that need not change), of the caption that
      is nearest - against `constant` (the one answer that scores best on these very pictures) and
      against `shuffled` (the same answers exchanged among the pictures). Intervals draw whole
      classes. `right` counts the whole ones, `mean` is the mean score.
    """
    if not len(answers) == len(captions) == len(labels) >= 2:
        raise JanusFlowError(
            "captions: expected two or more pictures with an answer, captions and a label each; "
            f"got {len(labels)} pictures, {len(answers)} answers, {len(captions)} lists of captions"
        )
    groups = [x.name for x in labels]
    # A constant answer that is right of colour, class or both is some picture's own caption.
    candidates = list(dict.fromkeys(c[0] for c in captions))
    every = caption_table(candidates, captions, labels)
    out: dict[str, Any] = {"of": len(answers)}
    for kind, table in caption_table(answers, captions, labels).items():
        best = int(every[kind].mean(1).argmax())
        own, others = stats.against_others(table)
        out[kind] = {
            "right": int((own == 1).sum()),
            "mean": float(own.mean()),
            "constant": {
                "answer": candidates[best],
                **stats.compare(own, every[kind][best], groups),
            },
            "shuffled": stats.compare(own, others, groups),
        }
    return out
