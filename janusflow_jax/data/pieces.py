"""Records -> pieces that fit a row: conversations split at turns, documents at images, long text
anywhere. What still does not fit is left out and counted.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from janusflow_jax.data.lengths import Lengths


class Pieces(NamedTuple):
    """The samples of a source, in the order of its records.

    `begin` and `end` are units of the record; of a text-only record, tokens after BOS
    (`samples.make`).
    """

    record: np.ndarray  # int64[p]
    begin: np.ndarray  # int64[p]
    end: np.ndarray  # int64[p]
    length: np.ndarray  # int64[p], positions in the row
    images: np.ndarray  # int64[p]
    left_out: int  # units that no row can hold

    def __len__(self) -> int:
        return len(self.record)


def cut(lengths: Lengths, slot_len: int, row_len: int, slots: int, head: int) -> Pieces:
    """Every record in as few pieces as its units allow.

    Args:
      lengths: of the records, in tokens.
      slot_len: positions of an image.
      row_len, slots: positions and images of a row.
      head: tokens in front of every piece of text (BOS).
    """
    text = _cut_text(lengths, np.flatnonzero(lengths.text), row_len, head)
    rest = _cut_units(lengths, np.flatnonzero(~lengths.text), slot_len, row_len, slots)
    order = np.argsort(np.concatenate([text.record, rest.record]), kind="stable")
    columns = (np.concatenate(pair)[order] for pair in zip(text[:-1], rest[:-1], strict=True))
    return Pieces(*columns, left_out=rest.left_out)


def _cut_text(lengths: Lengths, records: np.ndarray, row_len: int, head: int) -> Pieces:
    """Pieces of a record are of equal length to within one token, so that none is a crumb."""
    size = lengths.first[lengths.offsets[records]].astype(np.int64) - head
    count = np.maximum(-(-size // (row_len - head)), 1)
    first = np.repeat(np.cumsum(count) - count, count)
    place = np.arange(len(first)) - first
    record, size, count = (np.repeat(x, count) for x in (records, size, count))
    begin, end = size * place // count, size * (place + 1) // count
    return Pieces(record, begin, end, end - begin + head, np.zeros_like(record), 0)


def _cut_units(
    lengths: Lengths, records: np.ndarray, slot_len: int, row_len: int, slots: int
) -> Pieces:
    """Units of each record in order, as many to a piece as fit."""
    images = lengths.images.astype(np.int64)
    first = np.maximum(lengths.first + images * slot_len, 1)  # 0 is bad; found when it comes
    more = lengths.more + images * slot_len
    starts, ends = lengths.offsets[records], lengths.offsets[records + 1]
    if (ends - starts == 1).all():  # pictures with captions: a record is a piece
        fits = (first[starts] <= row_len) & (images[starts] <= slots)
        at, zero = starts[fits], np.zeros(int(fits.sum()), np.int64)
        left_out = int((~fits).sum())
        return Pieces(records[fits], zero, zero + 1, first[at], images[at], left_out)
    out: list[tuple[int, int, int, int, int]] = []
    left_out = 0
    for record, a, b in zip(records.tolist(), starts.tolist(), ends.tolist(), strict=True):
        begin, length, held = a, 0, 0  # of the open piece; no length: none is open
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
    return Pieces(*np.array(out, np.int64).reshape(-1, 5).T, left_out=left_out)
