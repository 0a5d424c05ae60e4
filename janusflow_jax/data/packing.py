"""How many rows a source makes: lengths of records -> samples that fit a row -> bins.

    lengths  `load_lengths`  tokens of every unit of every record, stored beside the data set
    samples  `divide`        stretches of records, none longer than a row
    bins     `pack`          samples that fill a row together

This is done once, when a run opens the source. A unit and a sample are defined in `samples`; which
bin a row holds is arithmetic (`mixture`).
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from absl import logging
from etils import epath
from jaxtyping import Bool

from janusflow_jax.config import files
from janusflow_jax.config.errors import DataError
from janusflow_jax.data import chat_format, samples as samples_lib, sources
from janusflow_jax.data.sources import Fields

SMALL = 100_000
"""A run measures up to this many records itself; more need tools/measure_lengths.py."""


# --- lengths of records, in tokens


class Lengths(NamedTuple):
    """Units of records (see `samples.Unit`): record i has units [offsets[i], offsets[i + 1]).

    A length counts text only, so that stored lengths serve every image size. A record that makes no
    sample has one unit of length 0.
    """

    offsets: np.ndarray  # int64[n + 1]
    text: np.ndarray  # bool[n], text that may be divided anywhere (one unit)
    first: np.ndarray  # int32[m]
    more: np.ndarray  # int32[m]
    images: np.ndarray  # int32[m]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def digest(self) -> str:
        total = hashlib.sha256()
        for column in self:
            total.update(np.ascontiguousarray(column).data)
        return total.hexdigest()


def measure_lengths(source: Any, task: str, form: str, chat: chat_format.ChatFormat) -> Lengths:
    """Lengths of the units of each record, in a task and form."""
    units: list[list[samples_lib.Unit]] = []
    text = np.zeros(len(source), bool)
    for i in range(len(source)):
        record = source[i]
        try:
            units.append(samples_lib.units(record, task, form, chat))
            text[i] = samples_lib.kind(record, task) == "text"
        except DataError:
            units.append([samples_lib.Unit(0, 0, int(task != "text"))])
    return lengths_of_units(units, text)


def lengths_of_units(
    units: Sequence[Sequence[samples_lib.Unit]], text: Bool[np.ndarray, "n"]
) -> Lengths:
    """Lengths of records from their units.

    Args:
      units: of each record.
      text: which records are text that may be divided anywhere.
    """
    offsets = np.cumsum([0, *map(len, units)], dtype=np.int64)
    columns = np.array([u for record in units for u in record], np.int32).reshape(-1, 3).T
    return Lengths(offsets, text, *columns)


def join_lengths(parts: Sequence[tuple[Lengths, np.ndarray]]) -> Lengths:
    """Lengths of the records of several data sets, one after the other.

    Args:
      parts: (lengths, which records stay, bool[n]) of at least one data set.
    """
    counts, text, columns = [], [], []
    for lengths, stays in parts:
        count = np.diff(lengths.offsets)
        counts.append(count[stays])
        text.append(lengths.text[stays])
        units = np.repeat(stays, count)
        columns.append(np.stack([lengths.first, lengths.more, lengths.images])[:, units])
    offsets = np.concatenate([[0], *counts]).cumsum().astype(np.int64)
    return Lengths(offsets, np.concatenate(text), *np.hstack(columns))


def lengths_path(
    path: epath.PathLike,
    split: str,
    task: str,
    form: str,
    chat: chat_format.ChatFormat,
    fields: Fields = (),
) -> epath.Path:
    """The file with the lengths of a split, for a task, form, tokenizer and choice of fields."""
    chosen = f"-{hashlib.sha256(repr(fields).encode()).hexdigest()[:8]}" if fields else ""
    name = f"{split}-{task}-{form}-{_lengths_key(chat)[:16]}{chosen}.npz"
    return files.resolve(path) / "lengths" / name


def _lengths_key(chat: chat_format.ChatFormat) -> str:
    """Digest of what lengths depend on: the tokenizer's files and the fixed words of the forms."""
    words = (
        "units",
        chat.hash,
        chat_format.SYSTEM_PROMPT,
        chat_format.CAPTION_REQUEST,
        samples_lib.QUESTION,
    )
    return hashlib.sha256("\0".join(words).encode()).hexdigest()


def store_lengths(file: epath.Path, lengths: Lengths, chat: chat_format.ChatFormat) -> None:
    """Writes lengths to their file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    data = io.BytesIO()
    np.savez(data, hash=np.array(_lengths_key(chat)), **lengths._asdict())
    sources.write_whole(file, data.getvalue())


def load_lengths(
    source: Any, path: str, split: str, task: str, form: str, chat: chat_format.ChatFormat
) -> Lengths:
    """The stored lengths. A small data set that has none is measured, and its lengths are stored.

    Args:
      source: the open split.
      path: its folder, where lengths are stored.
      split, task, form: as in the config.
      chat: the tokenizer.
    Raises:
      DataError: the stored lengths are of other records, or there are none for this tokenizer and
        more than SMALL records.
    """
    fields = getattr(source, "fields", ())
    file = lengths_path(path, split, task, form, chat, fields)
    if file.exists():
        with np.load(io.BytesIO(file.read_bytes())) as stored:
            lengths = Lengths(*(stored[name] for name in Lengths._fields))
        if len(lengths) == len(source):
            return lengths
        problem = f"expected {len(source)} lengths; got {len(lengths)}: the data set was made again"
    elif len(source) <= SMALL:
        lengths = measure_lengths(source, task, form, chat)
        try:
            store_lengths(file, lengths, chat)
        except OSError as e:
            logging.warning("%s: cannot store lengths for the next run (%s)", file, e)
        return lengths
    else:
        problem = (
            f"expected stored lengths; got none, and {len(source):,} records are too many to "
            "measure at start"
        )
    options = "".join(f" --field {ours}={theirs}" for ours, theirs in fields)
    raise DataError(
        f"{file}: {problem}; run\n  python tools/measure_lengths.py --data {path} --split {split} "
        f"--task {task} --format {form} --tokenizer {chat.folder}{options}"
    )


# --- samples that fit a row


class Samples(NamedTuple):
    """Samples of a source. Each is a stretch of one record.

    `begin` and `end` count units of the record, or tokens after BOS of a text-only record (see
    `samples.encode`).
    """

    record: np.ndarray  # int64[n]
    begin: np.ndarray  # int64[n]
    end: np.ndarray  # int64[n]
    length: np.ndarray  # int64[n], positions in the row
    images: np.ndarray  # int64[n]


def divide(
    lengths: Lengths, slot_len: int, row_len: int, slots: int, head: int
) -> tuple[Samples, int]:
    """Divides every record into as few samples as its units allow.

    Conversations are divided between turns, documents in front of images, text anywhere.

    Args:
      lengths: of the records, in tokens.
      slot_len: positions of an image.
      row_len, slots: positions and images of a row.
      head: tokens in front of every sample (BOS).
    Returns:
      (samples in the order of their records, number of units that no row can hold).
    """
    text = _divide_text(lengths, np.flatnonzero(lengths.text), row_len, head)
    rest, left_out = _divide_units(lengths, np.flatnonzero(~lengths.text), slot_len, row_len, slots)
    columns = [np.concatenate(pair) for pair in zip(text, rest, strict=True)]
    order = np.argsort(columns[0], kind="stable")
    return Samples(*(column[order] for column in columns)), left_out


def _divide_text(lengths: Lengths, records: np.ndarray, row_len: int, head: int) -> Samples:
    """Samples of a record have equal lengths, to within one token, so that none is tiny."""
    size = lengths.first[lengths.offsets[records]].astype(np.int64) - head
    count = np.maximum(-(-size // (row_len - head)), 1)
    first = np.repeat(np.cumsum(count) - count, count)
    place = np.arange(len(first)) - first
    record, size, count = (np.repeat(x, count) for x in (records, size, count))
    begin, end = size * place // count, size * (place + 1) // count
    return Samples(record, begin, end, end - begin + head, np.zeros_like(record))


def _divide_units(
    lengths: Lengths, records: np.ndarray, slot_len: int, row_len: int, slots: int
) -> tuple[Samples, int]:
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
        samples = Samples(records[fits], zero, zero + 1, first[at], images[at])
        return samples, int((~fits).sum())
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
    return Samples(*np.array(out, np.int64).reshape(-1, 5).T), left_out


# --- bins


class Placed(NamedTuple):
    """A sample of a bin: a row of `Samples`, and its first position in the bin."""

    record: int
    begin: int
    end: int
    length: int
    images: int
    offset: int


@dataclasses.dataclass(frozen=True)
class Bins:
    """Samples packed into rows: bin b holds samples [starts[b], starts[b + 1])."""

    starts: np.ndarray  # int64[num_bins + 1]
    samples: Samples  # in the order of the bins
    offsets: np.ndarray  # int64[num_samples], first position of each in its bin

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, b: int) -> list[Placed]:
        inside = slice(self.starts[b], self.starts[b + 1])
        columns = (column[inside].tolist() for column in (*self.samples, self.offsets))
        return [Placed(*values) for values in zip(*columns, strict=True)]


def pack(samples: Samples, row_len: int, slots: int) -> Bins:
    """First-fit decreasing: each sample, longest first, goes to the first bin that has room.

    Args:
      samples: with lengths from 1 to row_len, and at most `slots` images.
      row_len: positions of a bin.
      slots: images that fit into a bin.
    """
    order = np.argsort(-samples.length, kind="stable")
    # Two binary trees. A leaf holds the room and the free slots of a bin, a node above it the
    # maximum of what is below. There are never more bins than samples.
    num_leaves = 1 << max(len(order) - 1, 0).bit_length()
    room, free = [row_len] * (2 * num_leaves), [slots] * (2 * num_leaves)
    bins, offsets = np.zeros(len(order), np.int64), np.zeros(len(order), np.int64)
    sizes = zip(samples.length[order].tolist(), samples.images[order].tolist(), strict=True)
    for i, (length, images) in enumerate(sizes):
        node = _first_fit(room, free, length, images)
        bins[i], offsets[i] = node - num_leaves, row_len - room[node]
        room[node] -= length
        free[node] -= images
        while node > 1:
            node //= 2
            room[node] = max(room[2 * node], room[2 * node + 1])
            free[node] = max(free[2 * node], free[2 * node + 1])
    by_bin = np.argsort(bins, kind="stable")
    return Bins(
        starts=np.concatenate([[0], np.bincount(bins).cumsum()]).astype(np.int64),
        samples=Samples(*(column[order[by_bin]] for column in samples)),
        offsets=offsets[by_bin],
    )


def _first_fit(room: list[int], free: list[int], length: int, images: int) -> int:
    """The first leaf with enough room and free slots."""
    num_leaves = len(room) // 2
    nodes = [1]
    while True:  # the two maxima of a node may be of different bins: then search further right
        node = nodes.pop()
        while room[node] >= length and free[node] >= images:
            if node >= num_leaves:
                return node
            nodes.append(2 * node + 1)
            node = 2 * node
