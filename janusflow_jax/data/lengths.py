"""Lengths of samples in tokens, stored beside the data set, for one tokenizer and one form.

A length counts text only: positions of an image are added by the reader, so one file serves every
picture size.
"""

from __future__ import annotations

import hashlib
import io
import uuid
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from absl import logging
from etils import epath
from jaxtyping import Bool

from janusflow_jax.config.errors import DataError
from janusflow_jax.data import chat_format, samples

Fields = tuple[tuple[str, str], ...]
SMALL = 100_000
"""Up to this many records, lengths are measured when a run starts; more need the command."""


def lengths_path(
    path: epath.PathLike,
    split: str,
    task: str,
    form: str,
    chat: chat_format.ChatFormat,
    fields: Fields = (),
) -> epath.Path:
    """Where the lengths of a split, task, form, tokenizer and choice of fields are stored."""
    chosen = hashlib.sha256(repr(fields).encode()).hexdigest()[:8]
    name = f"{split}-{task}-{form}-{_key(chat)[:16]}{f'-{chosen}' if fields else ''}.npz"
    return epath.Path(path) / "lengths" / name


def _key(chat: chat_format.ChatFormat) -> str:
    """What lengths depend on: the tokenizer's files and the fixed words of the forms."""
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
    text: np.ndarray  # bool[n], text that may be cut anywhere (one unit)
    first: np.ndarray  # int32[m]
    more: np.ndarray  # int32[m]
    images: np.ndarray  # int32[m]

    def __len__(self) -> int:
        return len(self.offsets) - 1


def measure(source: Any, task: str, form: str, chat: chat_format.ChatFormat) -> Lengths:
    """Tokens of each record's units in their form, without the positions of images."""
    found: list[list[samples.Unit]] = []
    text = np.zeros(len(source), bool)
    for i in range(len(source)):
        record = source[i]
        try:
            found.append(samples.units(record, task, form, chat))
            text[i] = samples.kind(record, task) == "text"
        except DataError:
            found.append([samples.Unit(0, 0, int(task != "text"))])
    return of_units(found, text)


def of_units(units: Sequence[Sequence[samples.Unit]], text: Bool[np.ndarray, "n"]) -> Lengths:
    """Lengths of records whose units are known.

    Args:
      units: of each record.
      text: whether a record is text that may be cut anywhere.
    """
    offsets = np.cumsum([0, *map(len, units)], dtype=np.int64)
    columns = np.array([u for record in units for u in record], np.int32).reshape(-1, 3).T
    return Lengths(offsets, text, *columns)


def join(parts: Sequence[tuple[Lengths, np.ndarray]]) -> Lengths:
    """The lengths of the records of several data sets in a row.

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
    """The stored lengths; a small data set is measured, and they are stored for the next time.

    Args:
      source: the open split.
      path: its folder, where lengths are stored.
      split, task, form: as in the config.
      chat: the tokenizer.
    Raises:
      DataError: nothing stored for this tokenizer and more than SMALL records, or a stored file
        that does not belong to this data.
    """
    fields = getattr(source, "fields", ())
    command = _command(path, split, task, form, chat, fields)
    file = lengths_path(path, split, task, form, chat, fields)
    if file.exists():
        with np.load(io.BytesIO(file.read_bytes())) as stored:
            found = str(stored["hash"])
            known = set(Lengths._fields) <= set(stored.files)
            lengths = Lengths(*(stored[n] for n in Lengths._fields)) if known else None
        if lengths is not None and found == _key(chat) and len(lengths) == len(source):
            return lengths
        raise DataError(
            f"{file}: expected {len(source)} lengths for tokenizer {_key(chat)[:16]}; got "
            f"{'none' if lengths is None else len(lengths)} for {found[:16]}: the data set was "
            f"made again; run\n  {command}"
        )
    if len(source) > SMALL:
        others = [p.name for p in file.parent.glob("*.npz")] if file.parent.exists() else []
        raise DataError(
            f"{path}: expected stored lengths {file.name} for this tokenizer and form; got "
            f"{others or 'none'}; {len(source):,} records are too many to measure at start; "
            f"run\n  {command}"
        )
    lengths = measure(source, task, form, chat)
    try:
        store(file, lengths, chat)
    except OSError as e:
        logging.warning("%s: lengths are not kept for the next run (%s)", file, e)
    return lengths


def store(file: epath.Path, lengths: Lengths, chat: chat_format.ChatFormat) -> None:
    """Writes lengths, whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    data = io.BytesIO()
    np.savez(data, hash=np.array(_key(chat)), **lengths._asdict())
    part = file.parent / f".{file.name}.{uuid.uuid4().hex}"
    part.write_bytes(data.getvalue())
    part.replace(file)


def _command(
    path: str, split: str, task: str, form: str, chat: chat_format.ChatFormat, fields: Fields
) -> str:
    return (
        f"python tools/measure_lengths.py --data {path} --split {split} --task {task} "
        f"--format {form} --tokenizer {chat.folder}"
    ) + "".join(f" --field {ours}={theirs}" for ours, theirs in fields)
