"""Lengths of samples in tokens, stored beside the data set, for one tokenizer and one form.

A length counts text only: positions of an image are added by the reader, so one file serves every
picture size.
"""

from __future__ import annotations

import hashlib
import io
import uuid
from typing import Any

import numpy as np
from absl import logging
from etils import epath

from janusflow_jax.data import chat_format, samples

SMALL = 100_000
"""Up to this many records, lengths are measured when a run starts; more need the command."""


class LengthsError(ValueError):
    """No stored lengths for this tokenizer; names the command that makes them."""


def lengths_path(
    path: epath.PathLike, split: str, task: str, form: str, chat: chat_format.ChatFormat
) -> epath.Path:
    """Where the lengths of a split, task, form and tokenizer are stored."""
    return epath.Path(path) / "lengths" / f"{split}-{task}-{form}-{_key(chat)[:16]}.npz"


def _key(chat: chat_format.ChatFormat) -> str:
    """What lengths depend on: the tokenizer's files and the fixed words of the forms."""
    words = (chat.hash, chat_format.SYSTEM_PROMPT, chat_format.CAPTION_REQUEST, samples.QUESTION)
    return hashlib.sha256("\0".join(words).encode()).hexdigest()


def measure(source: Any, task: str, form: str, chat: chat_format.ChatFormat) -> np.ndarray:
    """int32[n]: tokens of each record's longest caption with its form, without image positions.

    A record that makes no sample (no caption) has the length 0.
    """
    out = np.zeros(len(source), np.int32)
    for i in range(len(source)):
        out[i] = samples.measure(source[i], task, form, chat)
    return out


def load_lengths(
    source: Any, path: str, split: str, task: str, form: str, chat: chat_format.ChatFormat
) -> np.ndarray:
    """The stored lengths; a small data set is measured, and they are stored for the next time.

    Args:
      source: the open split.
      path: its folder, where lengths are stored.
      split, task, form: as in the config.
      chat: the tokenizer.
    Raises:
      LengthsError: nothing stored for this tokenizer and more than SMALL records, or a stored file
        that does not belong to this data.
    """
    file = lengths_path(path, split, task, form, chat)
    if file.exists():
        with np.load(io.BytesIO(file.read_bytes())) as stored:
            found, lengths = str(stored["hash"]), stored["lengths"]
        if found == _key(chat) and len(lengths) == len(source):
            return lengths
        raise LengthsError(
            f"{file}: expected {len(source)} lengths for tokenizer {_key(chat)[:16]}; got "
            f"{len(lengths)} for {found[:16]}: the data set was made again; run\n  "
            + _command(path, split, task, form, chat)
        )
    if len(source) > SMALL:
        others = [p.name for p in file.parent.glob("*.npz")] if file.parent.exists() else []
        raise LengthsError(
            f"{path}: expected stored lengths {file.name} for this tokenizer and form; got "
            f"{others or 'none'}; {len(source):,} records are too many to measure at start; run\n  "
            + _command(path, split, task, form, chat)
        )
    lengths = measure(source, task, form, chat)
    try:
        store(file, lengths, chat)
    except OSError as e:
        logging.warning("%s: lengths are not kept for the next run (%s)", file, e)
    return lengths


def store(file: epath.Path, lengths: np.ndarray, chat: chat_format.ChatFormat) -> None:
    """Writes lengths, whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    data = io.BytesIO()
    np.savez(data, lengths=lengths, hash=np.array(_key(chat)))
    part = file.parent / f".{file.name}.{uuid.uuid4().hex}"
    part.write_bytes(data.getvalue())
    part.replace(file)


def _command(path: str, split: str, task: str, form: str, chat: chat_format.ChatFormat) -> str:
    return (
        f"python tools/measure_lengths.py --data {path} --split {split} --task {task} "
        f"--format {form} --tokenizer {chat.folder}"
    )
