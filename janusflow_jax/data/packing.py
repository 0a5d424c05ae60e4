"""How many rows a source makes: lengths of records -> samples that fit a row -> bins.

    lengths  `load_lengths`  tokens of every unit of every record, stored beside the data set
    samples  `divide`        stretches of records, none longer than a row
    bins     `pack`          samples that fill a row together

This is done once, when a run opens the source, without a loop over records or samples: there may be
hundreds of millions. A unit and a sample are defined in `samples`; which bin a row holds is
arithmetic (`mixture`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import zipfile
from collections.abc import Generator, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from absl import logging
from etils import epath
from jaxtyping import Bool

from janusflow_jax.config import files
from janusflow_jax.config.errors import DataError
from janusflow_jax.data import chat_format, mixture, samples as samples_lib, sources
from janusflow_jax.data.sources import Fields

SMALL = 100_000
"""A run measures up to this many records itself; more need tools/measure_lengths.py."""
CHUNK = 1 << 20
"""Records or samples that are processed at a time, to save memory."""


# --- lengths of records, in tokens


class Lengths(NamedTuple):
    """Units of records (see `samples.Unit`): record i has units [offsets[i], offsets[i + 1]).

    A length counts text only, so that stored lengths serve every image size. A record that makes no
    sample has one unit of length 0. Text that may be divided anywhere has one unit; the entries
    behind it are its marks (see `samples.Mark`).
    """

    offsets: np.ndarray  # int64[n + 1]
    text: np.ndarray  # bool[n], text that may be divided anywhere
    first: np.ndarray  # int32[m]
    more: np.ndarray  # int32[m]
    images: np.ndarray  # int32[m]

    def __len__(self) -> int:
        return len(self.offsets) - 1


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
) -> Iterator[Lengths]:
    """The stored lengths, of CHUNK records at a time. A small data set that has none is measured,
    and its lengths are stored.

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
        with contextlib.closing(_read_lengths(file)) as chunks:
            count = next(chunks)
            if count == len(source):
                yield from chunks
                return
        problem = f"expected {len(source)} lengths; got {count}: the data set was made again"
    elif len(source) <= SMALL:
        lengths = measure_lengths(source, task, form, chat)
        try:
            store_lengths(file, lengths, chat)
        except OSError as e:
            logging.warning("%s: cannot store lengths for the next run (%s)", file, e)
        yield lengths
        return
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


def _read_lengths(file: epath.Path) -> Generator[Any, None, None]:
    """The number of records, then the lengths of CHUNK records at a time."""
    with contextlib.ExitStack() as stack:
        archive = zipfile.ZipFile(stack.enter_context(file.open("rb")))
        streams, sizes, dtypes = {}, {}, {}
        for name in Lengths._fields:
            streams[name] = stack.enter_context(archive.open(f"{name}.npy"))
            np.lib.format.read_magic(streams[name])
            (sizes[name],), _, dtypes[name] = np.lib.format.read_array_header_1_0(streams[name])

        def read(name: str, count: int) -> np.ndarray:
            data = streams[name].read(count * dtypes[name].itemsize)
            return np.frombuffer(data, dtypes[name])

        left = sizes["offsets"] - 1
        yield left
        offsets = read("offsets", 1)
        while True:
            count = min(left, CHUNK)
            offsets = np.concatenate([offsets[-1:], read("offsets", count)])
            units = int(offsets[-1] - offsets[0])
            columns = [read(name, units) for name in ("first", "more", "images")]
            yield Lengths(offsets - offsets[0], read("text", count), *columns)
            left -= count
            if not left:
                return


class Marks:
    """The marks of all texts of a source: 12 bytes each, one for every 2,000 tokens."""

    def __init__(self) -> None:
        self._columns = np.zeros((3, 0), np.uint32)  # record, token, character

    def collect(self, chunks: Iterable[Lengths]) -> Iterator[Lengths]:
        """The chunks as they are; their marks are kept."""
        columns, num_records = [self._columns], 0
        for lengths in chunks:
            is_mark = np.repeat(lengths.text, np.diff(lengths.offsets))
            is_mark[lengths.offsets[:-1]] = False
            record = np.searchsorted(lengths.offsets, np.flatnonzero(is_mark), side="right") - 1
            values = num_records + record, lengths.first[is_mark], lengths.more[is_mark]
            columns.append(np.stack(values).astype(np.uint32))
            num_records += len(lengths)
            yield lengths
        self._columns = np.concatenate(columns, axis=1)

    def of(self, record: int) -> list[samples_lib.Mark]:
        """The marks of a record, in order; empty where it is tokenized as a whole."""
        ends = np.array((record, record + 1), np.uint32)  # of another type all would be copied
        begin, end = np.searchsorted(self._columns[0], ends)
        return [samples_lib.Mark(*mark) for mark in self._columns[1:, begin:end].T.tolist()]


# --- samples that fit a row


class Samples(NamedTuple):
    """Samples of a source, in columns of unsigned integers.

    Each is a stretch of one record. `begin` and `end` count units of the record, or tokens after
    BOS of a text-only record (see `samples.encode`).
    """

    record: np.ndarray  # [n]
    begin: np.ndarray  # [n]
    end: np.ndarray  # [n]
    length: np.ndarray  # [n], positions in the row
    images: np.ndarray  # [n]

    def digest(self) -> str:
        """SHA-256 of all columns."""
        total = hashlib.sha256()
        for column in self:
            total.update(np.ascontiguousarray(column).data)
        return total.hexdigest()


def divide(
    chunks: Iterable[Lengths], slot_len: int, row_len: int, slots: int, head: int
) -> tuple[Samples, int]:
    """Divides every record into as few samples as its units allow.

    Conversations are divided between turns, documents in front of images, text anywhere.

    Args:
      chunks: lengths of the records, in tokens, in one piece or several.
      slot_len: positions of an image.
      row_len, slots: positions and images of a row.
      head: tokens in front of every sample (BOS).
    Returns:
      (samples, number of units that no row can hold).
    """
    # Buffers that grow in place: a list of arrays would be in memory twice when it is joined.
    columns = [bytearray() for _ in Samples._fields]
    kinds = (*3 * [np.uint32], np.min_scalar_type(row_len), np.min_scalar_type(slots))
    num_records = left_out = 0
    for lengths in chunks:
        text = _divide_text(lengths, np.flatnonzero(lengths.text), row_len, head)
        records = np.flatnonzero(~lengths.text)
        rest, lost = _divide_units(lengths, records, slot_len, row_len, slots)
        text.record[:] += num_records
        rest.record[:] += num_records
        num_records, left_out = num_records + len(lengths), left_out + lost
        for column, kind, *values in zip(columns, kinds, text, rest, strict=True):
            column += np.concatenate(values).astype(kind).tobytes()
    return Samples(*map(_column, columns, kinds)), left_out


def _column(data: bytearray, kind: Any) -> np.ndarray:
    """A buffer as an array. A value that all samples share takes no memory."""
    values = np.frombuffer(data, kind)
    if len(values) and values.min() == values.max():
        return np.broadcast_to(values[0].copy(), values.shape)
    return values


def _divide_text(lengths: Lengths, records: np.ndarray, row_len: int, head: int) -> Samples:
    """Samples of a record have equal lengths, to within one token, so that none is tiny."""
    size = np.maximum(lengths.first[lengths.offsets[records]].astype(np.int64) - head, 1)
    count = -(-size // (row_len - head))
    first = np.repeat(np.cumsum(count) - count, count)
    place = np.arange(len(first)) - first
    record, size, count = (np.repeat(x, count) for x in (records, size, count))
    begin, end = size * place // count, size * (place + 1) // count
    return Samples(record, begin, end, end - begin + head, np.zeros_like(record))


def _divide_units(
    lengths: Lengths, records: np.ndarray, slot_len: int, row_len: int, slots: int
) -> tuple[Samples, int]:
    """Takes the units of each record in order, as many to a sample as fit.

    All records take their first unit together, then those that have one their second, and so on.
    """
    images = lengths.images.astype(np.int64)
    # A record that makes no sample has length 0. It is packed, so that it is reported when its
    # turn comes.
    first = np.maximum(lengths.first + images * slot_len, 1)
    more = lengths.more + images * slot_len
    count = np.diff(lengths.offsets)[records]
    order = np.argsort(-count, kind="stable")
    records, count = records[order], count[order]
    # The open sample of each record; length 0: none is open.
    begin, length, held = np.zeros((3, len(records)), np.int64)
    closed, left_out = [], 0
    for i in range(int(count.max(initial=0))):
        n = int(np.searchsorted(-count, -i))  # records with more than i units
        unit = lengths.offsets[records[:n]] + i
        is_open = length[:n] > 0
        fits = (length[:n] + more[unit] <= row_len) & (held[:n] + images[unit] <= slots)
        ends = np.flatnonzero(is_open & ~fits)
        closed.append((records[ends], begin[ends], 0 * ends + i, length[ends], held[ends]))
        joins = is_open & fits
        begin[:n] = np.where(joins, begin[:n], i)
        held[:n] = np.where(joins, held[:n], 0) + images[unit]
        length[:n] = np.where(joins, length[:n] + more[unit], first[unit])
        too_long = (length[:n] > row_len) | (held[:n] > slots)
        length[:n][too_long] = 0
        left_out += int(too_long.sum())
    ends = np.flatnonzero(length)
    closed.append((records[ends], begin[ends], count[ends], length[ends], held[ends]))
    return Samples(*(np.concatenate(column) for column in zip(*closed, strict=True))), left_out


# --- bins


class Placed(NamedTuple):
    """A sample of a bin: a row of `Samples`."""

    record: int
    begin: int
    end: int
    length: int
    images: int


@dataclasses.dataclass(frozen=True)
class Bins:
    """Samples packed into rows.

    Samples of equal length and number of images are a *class*; they can replace each other. Bins
    that take the same numbers from the same classes are a *group*, and all of its bins are one
    entry here. Which samples of a class a bin holds is drawn anew for each epoch.
    """

    samples: Samples
    order: np.ndarray  # unsigned[num_samples], numbers of samples, class after class
    class_starts: np.ndarray  # int64[num_classes + 1], places in `order`
    class_length: np.ndarray  # int64[num_classes], positions of a sample
    group_starts: np.ndarray  # int64[num_groups + 1], bins
    groups: list[list[tuple[int, int, int]]]
    """Of a group: (class, first, count). Its bin j holds `count` samples of the class, numbers
    first + j * count on."""

    def __len__(self) -> int:
        return int(self.group_starts[-1])

    @property
    def num_positions(self) -> int:
        """Positions of all samples."""
        return int(np.diff(self.class_starts) @ self.class_length)

    def bin(self, b: int, key: tuple[int, ...] = ()) -> list[Placed]:
        """The samples of a bin, longest first.

        Args: key: chooses which samples of a class the bins hold; (): those of the first records
          are in the first bins.
        """
        group = int(np.searchsorted(self.group_starts, b, side="right")) - 1
        j = b - int(self.group_starts[group])
        out = []
        for c, first, count in self.groups[group]:
            start, end = self.class_starts[c : c + 2].tolist()
            for place in range(first + j * count, first + (j + 1) * count):
                if key:
                    place = mixture.permute(place, end - start, (*key, c))
                out.append(self._sample(start + place))
        return out

    def at_position(self, position: int) -> Placed:
        """The sample that holds a position, counted over all samples (see `num_positions`)."""
        sizes = np.diff(self.class_starts) * self.class_length
        ends = np.cumsum(sizes)
        c = int(np.searchsorted(ends, position, side="right"))
        place = (position - (ends[c] - sizes[c])) // self.class_length[c]
        return self._sample(int(self.class_starts[c] + place))

    def _sample(self, place: int) -> Placed:
        number = self.order[place]
        return Placed(*(int(column[number]) for column in self.samples))


def pack(samples: Samples, row_len: int, slots: int) -> Bins:
    """First-fit decreasing: each sample, longest first, goes to the first bin that has room.

    All samples of a class are placed at once.

    Args:
      samples: with lengths from 1 to row_len, and at most `slots` images.
      row_len: positions of a bin.
      slots: images that fit into a bin.
    """
    order, counts = _sort(samples, row_len, slots)
    keys = np.flatnonzero(counts)
    class_length, class_images = row_len - keys // (slots + 1), slots - keys % (slots + 1)
    # Groups in the order of their bins: room, free slots, number of bins. The last group is empty
    # and never runs out.
    state = np.array([[row_len], [slots], [len(order) + 1]])
    groups: list[list[tuple[int, int, int]]] = [[]]
    classes = zip(class_length.tolist(), class_images.tolist(), counts[keys].tolist(), strict=True)
    for c, (length, images, count) in enumerate(classes):
        room, free, size = state
        fit = room // length  # samples that fit each bin of a group
        if images:
            fit = np.minimum(fit, free // images)
        ends = np.cumsum(fit * size)
        split = int(np.searchsorted(ends, count, side="right"))  # the groups in front are filled
        for g in np.flatnonzero(fit[:split]).tolist():
            groups[g].append((c, int(ends[g] - fit[g] * size[g]), int(fit[g])))
        room[:split] -= fit[:split] * length
        free[:split] -= fit[:split] * images
        first = int(ends[split - 1]) if split else 0
        if first == count:
            continue
        # The next group is divided: bins that become full, one with the rest, untouched bins.
        filled, rest = divmod(count - first, int(fit[split]))
        parts = [(filled, int(fit[split])), (min(rest, 1), rest)]
        parts.append((int(size[split]) - sum(bins for bins, _ in parts), 0))
        columns, pieces, before = [], [], 0
        for bins, held in parts:
            if bins:
                columns.append((room[split] - held * length, free[split] - held * images, bins))
                pieces.append([(k, at + before * n, n) for k, at, n in groups[split]])
            if held and bins:
                pieces[-1].append((c, first, held))
            first, before = first + bins * held, before + bins
        groups[split : split + 1] = pieces
        state = np.concatenate([state[:, :split], np.transpose(columns), state[:, split + 1 :]], 1)
    return Bins(
        samples=samples,
        order=order,
        class_starts=np.concatenate([[0], np.cumsum(counts[keys])]),
        class_length=class_length,
        group_starts=np.concatenate([[0], np.cumsum(state[2, :-1])]),
        groups=groups[:-1],
    )


def _sort(samples: Samples, row_len: int, slots: int) -> tuple[np.ndarray, np.ndarray]:
    """Sorts samples by length and images, the greatest first; equal ones keep their order.

    Returns:
      (numbers of the samples, count of each key), key = (row_len - length) * (slots + 1) + slots -
      images.
    """
    num_samples, num_keys = len(samples.length), (row_len + 1) * (slots + 1)
    chunks = [slice(i, i + CHUNK) for i in range(0, num_samples, CHUNK)]

    def keys(chunk: slice) -> np.ndarray:
        length = samples.length[chunk].astype(np.int64)
        key = (row_len - length) * (slots + 1) + slots - samples.images[chunk]
        return key.astype(np.min_scalar_type(num_keys))  # numpy sorts 16 bits much faster

    counts = np.zeros(num_keys, np.int64)
    for chunk in chunks:
        counts += np.bincount(keys(chunk), minlength=num_keys)
    order = np.empty(num_samples, np.min_scalar_type(num_samples))
    free = np.cumsum(counts) - counts  # first free place of each key
    for chunk in chunks:
        key = keys(chunk)
        by_key, count = np.argsort(key, kind="stable"), np.bincount(key, minlength=num_keys)
        shift = free - (np.cumsum(count) - count)
        order[np.arange(len(key)) + shift[key[by_key]]] = by_key + chunk.start
        free += count
    return order, counts
