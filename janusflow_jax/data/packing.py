"""Arithmetic of the data position: samples, bins, permutations and the interleave of sources.

A record is divided into samples that fit a row; samples are packed into bins; a row is one bin of
one source. Which bin of which source a row holds follows from its number alone, in closed form:

    row -> (source, k)      `interleave`: the k-th row of that source
    k   -> (epoch, place)   divmod by the number of its bins
    place -> bin            `permute`, keyed by (seed, source, epoch)

Everything else that is random in a row (the caption, the crop, a dropped prompt, the text that
fills its tail) is drawn by `generator`, keyed by (seed, row, slot). Only numpy.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from janusflow_jax.data.lengths import Lengths

CAPTION, DROP_PROMPT, CROP, FILL_TAIL = range(4)
"""What a random number is for; see `generator`."""

SHARE_UNITS = 1_000_000
"""Shares of rows are rounded to multiples of 1 / SHARE_UNITS, so that they are exact."""

_ROUNDS = 4


def generator(key: tuple[int, ...], purpose: int) -> np.random.Generator:
    """A random generator of its own for every key, such as (seed, row, slot), and purpose."""
    return np.random.default_rng((*key, purpose))


class SampleTable(NamedTuple):
    """The samples of a source, in the order of its records; a sample is a stretch of one record.

    `begin` and `end` count units of the record, or tokens after BOS of a text-only record (see
    `samples.encode`).
    """

    record: np.ndarray  # int64[n]
    begin: np.ndarray  # int64[n]
    end: np.ndarray  # int64[n]
    length: np.ndarray  # int64[n], positions in the row
    images: np.ndarray  # int64[n]
    left_out: int  # units that no row can hold

    def __len__(self) -> int:
        return len(self.record)


def divide(lengths: Lengths, slot_len: int, row_len: int, slots: int, head: int) -> SampleTable:
    """Divides every record into as few samples as its units allow.

    Conversations are divided between turns, documents in front of images, text anywhere. What
    still does not fit a row is left out and counted.

    Args:
      lengths: of the records, in tokens.
      slot_len: positions of an image.
      row_len, slots: positions and images of a row.
      head: tokens in front of every sample (BOS).
    """
    text = _divide_text(lengths, np.flatnonzero(lengths.text), row_len, head)
    rest = _divide_units(lengths, np.flatnonzero(~lengths.text), slot_len, row_len, slots)
    order = np.argsort(np.concatenate([text.record, rest.record]), kind="stable")
    columns = (np.concatenate(pair)[order] for pair in zip(text[:-1], rest[:-1], strict=True))
    return SampleTable(*columns, left_out=rest.left_out)


def _divide_text(lengths: Lengths, records: np.ndarray, row_len: int, head: int) -> SampleTable:
    """Samples of a record have equal lengths, to within one token, so that none is tiny."""
    size = lengths.first[lengths.offsets[records]].astype(np.int64) - head
    count = np.maximum(-(-size // (row_len - head)), 1)
    first = np.repeat(np.cumsum(count) - count, count)
    place = np.arange(len(first)) - first
    record, size, count = (np.repeat(x, count) for x in (records, size, count))
    begin, end = size * place // count, size * (place + 1) // count
    return SampleTable(record, begin, end, end - begin + head, np.zeros_like(record), 0)


def _divide_units(
    lengths: Lengths, records: np.ndarray, slot_len: int, row_len: int, slots: int
) -> SampleTable:
    """Takes the units of each record in order, as many to a sample as fit."""
    images = lengths.images.astype(np.int64)
    # A record that makes no sample has length 0. It is packed, so that it is reported when its
    # turn comes.
    first = np.maximum(lengths.first + images * slot_len, 1)
    more = lengths.more + images * slot_len
    starts, ends = lengths.offsets[records], lengths.offsets[records + 1]
    if (ends - starts == 1).all():  # images with captions, without a loop: there may be millions
        fits = (first[starts] <= row_len) & (images[starts] <= slots)
        at, zero = starts[fits], np.zeros(int(fits.sum()), np.int64)
        left_out = int((~fits).sum())
        return SampleTable(records[fits], zero, zero + 1, first[at], images[at], left_out)
    out: list[tuple[int, int, int, int, int]] = []
    left_out = 0
    for record, a, b in zip(records.tolist(), starts.tolist(), ends.tolist(), strict=True):
        begin, length, held = a, 0, 0  # of the open sample; length 0: none is open
        for unit in range(a, b):
            fits = length + more[unit] <= row_len and held + images[unit] <= slots
            if length and fits:
                length, held = length + int(more[unit]), held + int(images[unit])
                continue
            if length:
                out.append((record, begin - a, unit - a, length, held))
            begin, length, held = unit, int(first[unit]), int(images[unit])
            if length > row_len or held > slots:
                length, left_out = 0, left_out + 1
        if length:
            out.append((record, begin - a, b - a, length, held))
    return SampleTable(*np.array(out, np.int64).reshape(-1, 5).T, left_out=left_out)


@dataclasses.dataclass(frozen=True)
class Bins:
    """Samples packed into rows: bin b holds samples[starts[b]:starts[b + 1]] at their offsets."""

    starts: np.ndarray  # int64[num_bins + 1]
    samples: np.ndarray  # int64[num_samples]
    offsets: np.ndarray  # int64[num_samples], positions
    used: int  # positions of all samples together

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, b: int) -> list[tuple[int, int]]:
        """(sample, its first position in the row) of each sample of a bin, in order."""
        inside = slice(self.starts[b], self.starts[b + 1])
        return list(zip(self.samples[inside].tolist(), self.offsets[inside].tolist(), strict=True))


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
        b = tree.first(length, count)
        if b == len(bins):
            bins.append([])
        offsets[i] = row_len - tree.room(b)
        bins[b].append(i)
        tree.fill(b, length, count)
    counts = [len(b) for b in bins]
    samples = np.array([i for b in bins for i in b], np.int64)
    return Bins(
        starts=np.concatenate([[0], np.cumsum(counts, dtype=np.int64)]).astype(np.int64),
        samples=samples,
        offsets=offsets[samples],
        used=int(lengths[samples].sum()),
    )


class _FirstFit:
    """Which bin is the first with room for a length and free slots for its images, in log time.

    Two binary trees hold what each bin has left in their leaves, and maxima above.
    """

    def __init__(self, row_len: int, slots: int):
        self._leaves = 1
        self._empty = (row_len, slots)
        self._room = [0, row_len]
        self._free = [0, slots]

    def room(self, b: int) -> int:
        return self._room[self._leaves + b]

    def first(self, length: int, images: int) -> int:
        """Number of the first bin with room; it may be a new one."""
        room, free = self._room, self._free
        open_nodes = [1]  # the two maxima may be of different bins: then search further right
        while open_nodes:
            node = open_nodes.pop()
            while room[node] >= length and free[node] >= images:
                if node >= self._leaves:
                    return node - self._leaves
                open_nodes.append(2 * node + 1)
                node = 2 * node
        self._grow()
        return self.first(length, images)

    def fill(self, b: int, length: int, images: int) -> None:
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


def mixture_of(mixtures: Sequence[Mixture], row: int) -> Mixture:
    """The mixture that holds for a row."""
    return next(m for m in reversed(mixtures) if m.first_row <= row)


def row_shares(
    weights: Sequence[float | int], fill: Sequence[float], text: Sequence[bool]
) -> tuple[list[int], float]:
    """Shares of rows that give the wanted shares of positions.

    Text-only data fills what images leave free; what it still lacks it gets as rows of its own.

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
    return shares.tolist(), filler


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

    The first source gets the rows where floor(row * p) rises. The other rows are numbered again and
    divided among the other sources in the same way. So any n consecutive rows that are offered to a
    source hold n * p of its rows, to within one.

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
