"""Captions that are nearly right: shared words, and letters that would have to change."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

_ARTICLES = frozenset(("a", "an", "the"))
_FRAMES = (["drawing", "of"], ["picture", "of"])


def words(text: str) -> list[str]:
    """What a caption says: its words without articles, and without 'a drawing of' in front, which
    is no part of the answer (half of two captions' words would be in common by it alone)."""
    found = [w for w in re.findall(r"[a-z0-9'-]+", text.lower()) if w not in _ARTICLES]
    return found[2:] if found[:2] in _FRAMES else found


def word_overlap(a: Sequence[str], b: Sequence[str]) -> Float[np.ndarray, "A B"]:
    """F1 of two captions' words, for every pair: 1 for the same words, 0 for none in common."""
    left, right = [frozenset(words(t)) for t in a], [frozenset(words(t)) for t in b]
    return np.asarray(
        [[2 * len(x & y) / (len(x) + len(y)) if x or y else 1.0 for y in right] for x in left],
        np.float64,
    )


def edit_likeness(a: Sequence[str], b: Sequence[str]) -> Float[np.ndarray, "A B"]:
    """1 - (letters to insert, delete or replace) / (letters of the longer one), for every pair.

    Of what captions say (`words`). The table of the edit distance is filled for all pairs at once.
    """
    x, y = ([" ".join(words(t)) for t in texts] for texts in (a, b))
    left, right = _codes(x), _codes(y)
    size_x, size_y = (np.asarray([len(t) for t in texts]) for texts in (x, y))
    row = np.broadcast_to(np.arange(right.shape[1] + 1), (len(x), len(y), right.shape[1] + 1))
    row = row.astype(np.int32)
    found = np.where(size_x[:, None] == 0, size_y[None], 0)
    pick = np.broadcast_to(size_y[None, :, None], (len(x), len(y), 1))
    for i in range(left.shape[1]):
        new = np.empty_like(row)
        new[..., 0] = i + 1
        for j in range(right.shape[1]):
            change = row[..., j] + (left[:, None, i] != right[None, :, j])
            new[..., j + 1] = np.minimum(np.minimum(row[..., j + 1], new[..., j]) + 1, change)
        row = new
        ended = np.take_along_axis(row, pick, axis=2)[..., 0]
        found = np.where(size_x[:, None] == i + 1, ended, found)
    longer = np.maximum(np.maximum(size_x[:, None], size_y[None]), 1)
    return 1 - found / longer


def _codes(texts: Sequence[str]) -> np.ndarray:
    """Letters as numbers, int32[N, longest]; 0 behind the end."""
    out = np.zeros((len(texts), max((len(t) for t in texts), default=0)), np.int32)
    for i, text in enumerate(texts):
        out[i, : len(text)] = [ord(letter) for letter in text]
    return out


def best_of(
    scores: Float[np.ndarray, "A T"], groups: Sequence[Sequence[str]]
) -> Float[np.ndarray, "A N"]:
    """The best score among each group of truths, which stand side by side in `scores`."""
    ends = np.cumsum([len(g) for g in groups])
    return np.stack([part.max(1) for part in np.split(scores, ends[:-1], axis=1)], axis=1)
