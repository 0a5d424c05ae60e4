"""Arithmetic of the data position: which bin of which source a row holds.

    row -> (source, k)      `interleave`: the k-th row of that source
    k   -> (epoch, place)   divmod by the number of its bins
    place -> bin            `permute`, keyed by (seed, source, epoch)

Everything else that is random in a row is drawn by `generator`, keyed by (seed, row, slot).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

CAPTION, DROP_PROMPT, CROP, FILL_TAIL = range(4)
"""What a random number is for; see `generator`."""

SHARE_UNITS = 1_000_000
"""Shares of rows are rounded to multiples of 1 / SHARE_UNITS, so that they are exact."""

_ROUNDS = 4


def generator(key: tuple[int, ...], purpose: int) -> np.random.Generator:
    """A random generator of its own for every key, such as (seed, row, slot), and purpose."""
    return np.random.default_rng((*key, purpose))


def bernoulli(key: tuple[int, ...], purpose: int, probability: float) -> bool:
    """True with a probability; see `generator`."""
    return generator(key, purpose).random() < probability


class Mixture(NamedTuple):
    """How the rows from `first_row` on are divided among the sources."""

    first_row: int
    weights: Sequence[float]  # wanted shares of positions, any scale
    shares: list[int]  # of rows, in SHARE_UNITS
    filler: float  # part of the rows with images whose free tail takes text
    earlier: list[int]  # rows that each source had in earlier mixtures


def mixtures(
    phases: Sequence[tuple[int, Sequence[float]]], fill: Sequence[float], text: Sequence[bool]
) -> list[Mixture]:
    """The mixtures of a run, in order.

    Args:
      phases: (first row, weights of the sources) of each.
      fill, text: of the sources, as in `row_shares`.
    """
    out: list[Mixture] = []
    earlier = [0] * len(fill)
    for first_row, weights in phases:
        if out:
            ended = count(first_row - out[-1].first_row, out[-1].shares)
            earlier = [a + b for a, b in zip(earlier, ended, strict=True)]
        out.append(Mixture(first_row, weights, *row_shares(weights, fill, text), earlier))
    return out


def row_shares(
    weights: Sequence[float | int], fill: Sequence[float], text: Sequence[bool]
) -> tuple[list[int], float]:
    """Shares of rows that give the wanted shares of positions.

    Text-only data fills what images leave free, up to half of its share, and gets the rest as rows
    of its own: in the tails it is read in short stretches only.

    Args:
      weights: wanted shares of positions, any scale.
      fill: part of a row's positions that each source's bins use, in (0, 1].
      text: which sources are text-only.
    Returns:
      (shares, filler), as in `Mixture`.
    """
    want = np.asarray(weights, np.float64) / np.sum(weights)
    is_text = np.asarray(text, bool)
    rows = want / np.asarray(fill, np.float64)
    text_want, tails = float(want[is_text].sum()), float((rows - want)[~is_text].sum())
    filler = 0.0
    if text_want > 0 and tails > 0:
        filler = min(text_want / 2 / tails, 1.0)
        rows[is_text] *= 1 - filler * tails / text_want
    shares = np.round(rows / rows.sum() * SHARE_UNITS).astype(int)
    shares[rows > 0] = np.maximum(shares[rows > 0], 1)
    shares[int(np.argmax(shares))] += SHARE_UNITS - int(shares.sum())
    return shares.tolist(), filler


def interleave(row: int, shares: Sequence[int]) -> tuple[int, int]:
    """Which source a row belongs to, and its place among that source's rows.

    The first source gets the rows where floor(row * p) rises. The other rows are numbered again and
    divided among the other sources in the same way. So any n consecutive rows that are offered to a
    source hold n * p of its rows, to within one.

    Args:
      row: number of the row, from 0.
      shares: integers that sum to SHARE_UNITS.
    Returns:
      (source, k).
    """
    left = SHARE_UNITS  # p = share / left
    for source, share in enumerate(shares[:-1]):
        before = row * share // left
        if (row + 1) * share // left > before:
            return source, before
        row -= before
        left -= share
    return len(shares) - 1, row


def count(num_rows: int, shares: Sequence[int]) -> list[int]:
    """How many of the first `num_rows` rows belong to each source; see `interleave`."""
    left, out = SHARE_UNITS, []
    for share in shares[:-1]:
        out.append(num_rows * share // left if left else 0)
        num_rows -= out[-1]
        left -= share
    return [*out, num_rows]


def permute(index: int, size: int, key: tuple[int, ...]) -> int:
    """Where a permutation of range(size), chosen by `key`, sends `index`, without a table.

    A Feistel network of four rounds on the smallest square of a power of two that holds `size`,
    repeated until the result is below `size`.
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
    """A 64-bit finalizer (the constants of splitmix64, Steele et al. 2014)."""
    x = (x + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    return x ^ (x >> 31)
