"""Records as the model will see them, before anything is prepared: tokens, targets, pictures."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath
from jaxtyping import UInt8
from PIL import Image, ImageDraw

from janusflow_jax.config.errors import DataError
from janusflow_jax.data import chat_format, images, samples
from janusflow_jax.data.prepare import build, report as prepare_report
from janusflow_jax.data.prepare.raw import Options, Skip

OPEN, CLOSE = "«", "»"
"""Around what the model learns to say."""
_CELL = 192  # side of a picture in the sheet, in pixels
_ACROSS = 4  # pictures of a sample that the sheet shows


class Shown(NamedTuple):
    """A record as a sample."""

    where: str
    text: str
    pictures: list[np.ndarray]


def show(
    options: Options, chat: chat_format.ChatFormat, task: str, form: str, count: int = 10
) -> tuple[list[Shown], prepare_report.Report]:
    """The first `count` records that make samples, and what was skipped on the way to them.

    Args:
      options: what to read and how.
      chat: the tokenizer.
      task, form: of the source that will read them.
    """
    report = prepare_report.Report()
    shown: list[Shown] = []
    with tempfile.TemporaryDirectory() as scratch:
        for found in _read(options, epath.Path(scratch)):
            if isinstance(found, Skip):
                prepare_report.add(report.skipped, found)
                continue
            where, record, _ = found
            try:
                sample = samples.encode(record, task, form, chat, choose=lambda _: 0)
            except DataError as e:
                prepare_report.add(report.skipped, Skip(where, "sample: none", str(e)))
                continue
            side = round(chat.num_image_tokens**0.5) * 16  # SigLIP's patches are 16 pixels wide
            fit = images.for_generation if task == "generate" else images.for_understanding
            pictures = [fit(images.decode(data), side) for data in sample.images]
            shown.append(Shown(where, text_of(sample, chat), pictures))
            if len(shown) == count:
                break
    report.records = {"shown": len(shown)}
    return shown, report


def text_of(sample: samples.Sample, chat: chat_format.ChatFormat) -> str:
    """The sample's tokens as text; targets between « and », a picture by its positions."""
    learned = np.r_[False, sample.target_mask[:-1]]  # the mask is of the next position
    slot = np.isin(sample.tokens, (chat.image_id, chat.gen_id))
    keys = list(zip(learned.tolist(), slot.tolist(), strict=True))
    parts, at = [], 0
    for (is_learned, is_slot), run in itertools.groupby(keys):
        length = len(list(run))
        ids = sample.tokens[at : at + length].tolist()
        at += length
        if is_slot:
            parts.append(f"[picture, {length} positions]")
            continue
        text = chat.tokenizer.decode(ids, skip_special_tokens=False)
        parts.append(f"{OPEN}{text}{CLOSE}" if is_learned else text)
    return "".join(parts)


def sheet(shown: Sequence[Shown]) -> UInt8[np.ndarray, "H W 3"]:
    """A row for each sample: its pictures as the model gets them, with the record's place."""
    rows = [s for s in shown if s.pictures]
    across = min(max((len(s.pictures) for s in rows), default=1), _ACROSS)
    width = max(across, 2) * (_CELL + 8)  # two: room for the place's name
    page = Image.new("RGB", (width, max(len(rows), 1) * (_CELL + 20)), "white")
    pen = ImageDraw.Draw(page)
    for i, sample in enumerate(rows):
        top = i * (_CELL + 20)
        more = len(sample.pictures) - _ACROSS
        title = sample.where + (f"  (and {more} more)" if more > 0 else "")
        pen.text((4, top + 3), title.encode("ascii", "replace").decode(), fill="black")
        for j, picture in enumerate(sample.pictures[:_ACROSS]):
            small = Image.fromarray(picture).resize((_CELL, _CELL), Image.Resampling.BICUBIC)
            page.paste(small, (j * (_CELL + 8) + 4, top + 18))
    return np.asarray(page)


def _read(options: Options, scratch: epath.Path) -> Iterator[Any]:
    """As `prepare.read`, over the first shards that come."""
    slices = scratch / build.PARTS / "slices"
    for i, shard in enumerate(build.FORMS[options.form].plan(options, slices)):
        yield from build.read(build.Job(str(scratch), i, shard, options))
