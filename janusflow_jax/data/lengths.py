"""Lengths of records in tokens, stored beside the data set, for one tokenizer and one form.

A length counts text only; the positions of images are added by the reader, so one file serves every
image size.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from absl import logging
from etils import epath
from jaxtyping import Bool

from janusflow_jax.config.errors import DataError
from janusflow_jax.data import chat_format, samples, sources
from janusflow_jax.data.sources import Fields

SMALL = 100_000
"""A run measures up to this many records itself; more need tools/measure_lengths.py."""


def lengths_path(
    path: epath.PathLike,
    split: str,
    task: str,
    form: str,
    chat: chat_format.ChatFormat,
    fields: Fields = (),
) -> epath.Path:
    """The file with the lengths of a split, for a task, form, tokenizer and choice of fields."""
    chosen = hashlib.sha256(repr(fields).encode()).hexdigest()[:8]
    name = f"{split}-{task}-{form}-{_key(chat)[:16]}{f'-{chosen}' if fields else ''}.npz"
    return epath.Path(path) / "lengths" / name


def _key(chat: chat_format.ChatFormat) -> str:
    """Digest of what lengths depend on: the tokenizer's files and the fixed words of the forms."""
    words = (
        "units",
        chat.hash,
        chat_format.SYSTEM_PROMPT,
        chat_format.CAPTION_REQUEST,
        samples.QUESTION,
    )
    return hashlib.sha256("\0".join(words).encode()).hexdigest()


class Lengths(NamedTuple):
    """Units of records (see `samples.Unit`): record i has units [offsets[i], offsets[i + 1]).

    A record that makes no sample has one unit of length 0.
    """

    offsets: np.ndarray  # int64[n + 1]
    text: np.ndarray  # bool[n], text that may be divided anywhere (one unit)
    first: np.ndarray  # int32[m]
    more: np.ndarray  # int32[m]
    images: np.ndarray  # int32[m]

    def __len__(self) -> int:
        return len(self.offsets) - 1


def measure(source: Any, task: str, form: str, chat: chat_format.ChatFormat) -> Lengths:
    """Tokens of each record's units in their form, without the positions of images."""
    units: list[list[samples.Unit]] = []
    text = np.zeros(len(source), bool)
    for i in range(len(source)):
        record = source[i]
        try:
            units.append(samples.units(record, task, form, chat))
            text[i] = samples.kind(record, task) == "text"
        except DataError:
            units.append([samples.Unit(0, 0, int(task != "text"))])
    return of_units(units, text)


def of_units(units: Sequence[Sequence[samples.Unit]], text: Bool[np.ndarray, "n"]) -> Lengths:
    """Lengths of records from their units.

    Args:
      units: of each record.
      text: which records are text that may be divided anywhere.
    """
    offsets = np.cumsum([0, *map(len, units)], dtype=np.int64)
    columns = np.array([u for record in units for u in record], np.int32).reshape(-1, 3).T
    return Lengths(offsets, text, *columns)


def join(parts: Sequence[tuple[Lengths, np.ndarray]]) -> Lengths:
    """Lengths of the records of several data sets, one after the other.

    Args:
      parts: (lengths, which records are kept, bool[n]) each.
    """
    counts, text, columns = [], [], []
    for one, keep in parts:
        count = np.diff(one.offsets)
        units = np.repeat(keep, count)
        counts.append(count[keep])
        text.append(one.text[keep])
        columns.append(np.stack([one.first, one.more, one.images])[:, units])
    offsets = np.concatenate([[0], *counts]).cumsum().astype(np.int64)
    empty = np.zeros((3, 0), np.int32)
    return Lengths(
        offsets, np.concatenate([np.zeros(0, bool), *text]), *np.hstack([empty, *columns])
    )


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
      DataError: the stored file does not belong to this data, or there is none for this tokenizer
        and there are more than SMALL records.
    """
    fields = getattr(source, "fields", ())
    command = (
        f"python tools/measure_lengths.py --data {path} --split {split} --task {task} "
        f"--format {form} --tokenizer {chat.folder}"
    ) + "".join(f" --field {ours}={theirs}" for ours, theirs in fields)
    file = lengths_path(path, split, task, form, chat, fields)
    if file.exists():
        with np.load(io.BytesIO(file.read_bytes())) as stored:
            key = str(stored["hash"])
            complete = set(Lengths._fields) <= set(stored.files)
            lengths = Lengths(*(stored[n] for n in Lengths._fields)) if complete else None
        if lengths is not None and key == _key(chat) and len(lengths) == len(source):
            return lengths
        raise DataError(
            f"{file}: expected {len(source)} lengths for tokenizer {_key(chat)[:16]}; got "
            f"{'none' if lengths is None else len(lengths)} for {key[:16]}: the data set was "
            f"made again; run\n  {command}"
        )
    if len(source) > SMALL:
        raise DataError(
            f"{file}: expected stored lengths; got none, and {len(source):,} records are too many "
            f"to measure at start; run\n  {command}"
        )
    lengths = measure(source, task, form, chat)
    try:
        store(file, lengths, chat)
    except OSError as e:
        logging.warning("%s: cannot store lengths for the next run (%s)", file, e)
    return lengths


def store(file: epath.Path, lengths: Lengths, chat: chat_format.ChatFormat) -> None:
    """Writes lengths to their file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    data = io.BytesIO()
    np.savez(data, hash=np.array(_key(chat)), **lengths._asdict())
    sources.write_whole(file, data.getvalue())
