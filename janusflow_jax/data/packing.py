"""Arithmetic of the data position: bins, permutations and the interleave of sources.

Everything here is a pure function of integers, so that a row's number alone says what it holds
(DESIGN section 1, "The data position is one integer"). Only numpy.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

SHARE_UNITS = 1_000_000
"""Shares of rows are rounded to multiples of 1 / SHARE_UNITS, so that they are exact."""

_ROUNDS = 4


@dataclasses.dataclass(frozen=True)
class Bins:
    """Samples packed into rows.

    Bin b holds samples[starts[b]:starts[b + 1]], each at its offset in the row.
    """

    starts: np.ndarray  # int64[num_bins + 1]
    samples: np.ndarray  # int64[num_samples]
    offsets: np.ndarray  # int64[num_samples], positions
    used: int  # positions of all samples together

    def __len__(self) -> int:
        return len(self.starts) - 1


def pack(
    lengths: Int[np.ndarray, "n"], images: Int[np.ndarray, "n"], row_len: int, slots: int
) -> Bins:
    """First-fit decreasing: each sample, longest first, goes to the first bin that has room.

    Args:
      lengths: positions of each sample; one with 0 or more than row_len is left out.
      images: of each sample; one with more than `slots` is left out.
      row_len: positions of a bin.
      slots: images that fit into a bin.
    """
    lengths, images = np.asarray(lengths, np.int64), np.asarray(images, np.int64)
    fits = np.flatnonzero((lengths > 0) & (lengths <= row_len) & (images <= slots))
    order = fits[np.argsort(-lengths[fits], kind="stable")]
    tree = _FirstFit(row_len, slots)
    bins: list[list[int]] = []
    offsets = np.zeros(len(lengths), np.int64)
    for i in order.tolist():
        length, count = int(lengths[i]), int(images[i])
        b = tree.find(length, count)
        if b == len(bins):
            bins.append([])
        offsets[i] = row_len - tree.room(b)
        bins[b].append(i)
        tree.take(b, length, count)
    counts = [len(b) for b in bins]
    samples = np.array([i for b in bins for i in b], np.int64)
    return Bins(
        starts=np.concatenate([[0], np.cumsum(counts, dtype=np.int64)]).astype(np.int64),
        samples=samples,
        offsets=offsets[samples],
        used=int(lengths[samples].sum()),
    )


class _FirstFit:
    """The first bin with room for a length and free slots for its images, in log time: trees of
    what each bin has left, maxima above."""

    def __init__(self, row_len: int, slots: int):
        self._leaves = 1
        self._empty = (row_len, slots)
        self._room = [0, row_len]
        self._free = [0, slots]

    def room(self, b: int) -> int:
        return self._room[self._leaves + b]

    def find(self, length: int, images: int) -> int:
        room, free = self._room, self._free
        open_nodes = [1]  # both maxima may stand in different bins: then look further right
        while open_nodes:
            node = open_nodes.pop()
            while room[node] >= length and free[node] >= images:
                if node >= self._leaves:
                    return node - self._leaves
                open_nodes.append(2 * node + 1)
                node = 2 * node
        self._grow()
        return self.find(length, images)

    def take(self, b: int, length: int, images: int) -> None:
        node = self._leaves + b
        self._room[node] -= length
        self._free[node] -= images
        while node > 1:
            node //= 2
            self._room[node] = max(self._room[2 * node], self._room[2 * node + 1])
            self._free[node] = max(self._free[2 * node], self._free[2 * node + 1])

    def _grow(self) -> None:
        """Doubles the number of bins; the new ones are empty."""
        old = self._leaves
        for tree, empty in zip((self._room, self._free), self._empty, strict=True):
            leaves = tree[old:] + [empty] * old
            tree[:] = [0] * (2 * old) + leaves
            for node in range(2 * old - 1, 0, -1):
                tree[node] = max(tree[2 * node], tree[2 * node + 1])
        self._leaves = 2 * old


def permute(index: int, size: int, key: tuple[int, ...]) -> int:
    """Where a permutation of range(size), chosen by `key`, sends `index`. No table is kept.

    A Feistel network of four rounds on the smallest square of a power of two that holds `size`,
    walked until it lands inside.
    """
    half = max((size - 1).bit_length() + 1, 2) // 2
    mask = (1 << half) - 1
    seed = 0x9E3779B97F4A7C15
    for part in key:
        seed = _mix(seed ^ (part & 0xFFFFFFFFFFFFFFFF))
    while True:
        left, right = index >> half, index & mask
        for i in range(_ROUNDS):
            left, right = right, left ^ (_mix(seed + (i << 48) + right) & mask)
        index = (left << half) | right
        if index < size:
            return index


def _mix(x: int) -> int:
    """A 64-bit finaliser (the constants of splitmix64, Steele et al. 2014)."""
    x = (x + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    return x ^ (x >> 31)


class Mixture(NamedTuple):
    """How rows are divided: shares of rows in SHARE_UNITS, and the part of the rows with images
    whose free tail takes a piece of text."""

    shares: list[int]
    filler: float


def mixture(weights: Sequence[float | int], fill: Sequence[float], text: Sequence[bool]) -> Mixture:
    """Shares of rows that give the wanted shares of positions.

    Text-only data fills what images leave free; what it still lacks it gets as rows of its own.

    Args:
      weights: wanted shares of positions, any scale.
      fill: part of a row's positions that each source's bins use, in (0, 1].
      text: which sources are text-only.
    """
    want = np.asarray(weights, np.float64) / np.sum(weights)
    is_text = np.asarray(text, bool)
    rows = want / np.asarray(fill, np.float64)
    text_want, image_rows = float(want[is_text].sum()), float(rows[~is_text].sum())
    filler = 0.0
    if text_want and image_rows:
        if image_rows < 1:  # every free tail is filled, and text has rows of its own
            filler = 1.0
            rows[is_text] = (1 - image_rows) * want[is_text] / text_want
        else:
            filler = text_want / (image_rows - 1 + text_want)
            rows[is_text] = 0
    shares = np.round(rows / rows.sum() * SHARE_UNITS).astype(int)
    shares[rows > 0] = np.maximum(shares[rows > 0], 1)
    shares[int(np.argmax(shares))] += SHARE_UNITS - int(shares.sum())
    return Mixture(shares.tolist(), filler)


def count(num_rows: int, shares: Sequence[int]) -> list[int]:
    """How many of the first `num_rows` rows belong to each source; see `interleave`."""
    left, out = SHARE_UNITS, []
    for share in shares[:-1]:
        out.append(num_rows * share // left if left else 0)
        num_rows -= out[-1]
        left -= share
    return [*out, num_rows]


def interleave(row: int, shares: Sequence[int]) -> tuple[int, int]:
    """Which source a row belongs to, and its place among that source's rows.

    Source s gets the rows where floor(row * p) rises; the rows that it leaves are numbered again
    and divided among the rest in the same way. So among any n rows of its turn, source s has
    n * p to within one.

    Args:
      row: number of the row, from 0.
      shares: integers that sum to SHARE_UNITS.
    Returns:
      (source, k).
    """
    left = SHARE_UNITS
    for source, share in enumerate(shares[:-1]):
        p = Fraction(share, left)
        before = row * p.numerator // p.denominator
        if (row + 1) * p.numerator // p.denominator > before:
            return source, before
        row -= before
        left -= share
    return len(shares) - 1, row
