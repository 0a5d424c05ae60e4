"""What a person reads: the report of what was skipped and why, and a preview of samples."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw

from janusflow_jax.config.errors import DataError
from janusflow_jax.data import chat_format, images, samples
from janusflow_jax.data.prepare.inputs import Skipped

EXAMPLES = 5
"""The report names the first few places of each reason."""
OPEN, CLOSE = "«", "»"
"""Around the tokens that are targets, in the text of a preview."""
_CELL = 192  # side of an image in the sheet, in pixels
_ACROSS = 4  # images of a sample that the sheet shows

Reasons = dict[str, dict[str, Any]]
"""reason -> {count, examples: [[place, detail], ...]}."""


@dataclasses.dataclass
class Report:
    """Counts of a shard, or of a whole data set; the examples are in the order of the inputs."""

    records: dict[str, int] = dataclasses.field(default_factory=dict)  # by split
    skipped: Reasons = dataclasses.field(default_factory=dict)
    dropped: Reasons = dataclasses.field(default_factory=dict)  # captions of good records

    @classmethod
    def total(cls, stored: Iterable[dict[str, Any]]) -> Report:
        """The sum of the reports of shards (`to_json`), in their order."""
        out = cls()
        for report in stored:
            for split, count in report["records"].items():
                out.records[split] = out.records.get(split, 0) + count
            for reasons, name in ((out.skipped, "skipped"), (out.dropped, "dropped_captions")):
                for reason, entry in report[name].items():
                    _add(reasons, reason, entry["count"], entry["examples"])
        return out

    def skip(self, where: str, why: Skipped) -> None:
        _add(self.skipped, why.reason, 1, [[where[:200], why.detail[:200]]])

    def drop_caption(self, where: str, why: Skipped) -> None:
        _add(self.dropped, why.reason, 1, [[where[:200], why.detail[:200]]])

    @property
    def num_records(self) -> int:
        return sum(self.records.values())

    @property
    def num_skipped(self) -> int:
        return sum(entry["count"] for entry in self.skipped.values())

    def to_json(self) -> dict[str, Any]:
        return {
            "records": dict(sorted(self.records.items())),
            "num_skipped": self.num_skipped,
            "skipped": dict(sorted(self.skipped.items())),
            "dropped_captions": dict(sorted(self.dropped.items())),
        }

    def table(self) -> str:
        """Splits, then reasons by count, each with its first examples."""
        lines = [f"{split}: {count:,} records" for split, count in sorted(self.records.items())]
        total = self.num_records + self.num_skipped
        share = f" ({self.num_skipped / total:.1%} of {total:,})" if total else ""
        lines += [f"skipped: {self.num_skipped:,}{share}", *_table(self.skipped)]
        if self.dropped:
            count = sum(entry["count"] for entry in self.dropped.values())
            lines.append(f"captions dropped from records that have others: {count:,}")
            lines += _table(self.dropped)
        return "\n".join(lines)


def _add(reasons: Reasons, reason: str, count: int, examples: list[list[str]]) -> None:
    entry = reasons.setdefault(reason, {"count": 0, "examples": []})
    entry["count"] += count
    entry["examples"] = (entry["examples"] + examples)[:EXAMPLES]


def _table(reasons: Reasons) -> list[str]:
    lines = []
    for reason, entry in sorted(reasons.items(), key=lambda x: (-x[1]["count"], x[0])):
        lines.append(f"{entry['count']:>10,}  {reason}")
        for where, detail in entry["examples"][:2]:
            lines.append(f"{'':>14}{where}" + (f": {detail}" if detail else ""))
    return lines


class Preview(NamedTuple):
    """A record as a sample of training."""

    where: str
    text: str
    images: list[np.ndarray]


def preview(
    records: Iterable[tuple[str, Any]],
    chat: chat_format.ChatFormat,
    task: str,
    form: str,
    count: int = 10,
) -> tuple[list[Preview], Report]:
    """The first `count` records that make samples, and what was skipped before them.

    Args:
      records: of `build.read_all`.
      chat: the tokenizer.
      task, form: of the source that will read the data set.
    """
    report, shown = Report(), []
    fit = images.for_generation if task == "generate" else images.for_understanding
    side = round(chat.num_image_tokens**0.5) * 16  # a patch of SigLIP has 16 pixels
    for where, record in records:
        if isinstance(record, Skipped):
            report.skip(where, record)
            continue
        try:
            sample = samples.encode(record.fields, task, form, chat, choose=lambda _: 0)
        except DataError as e:
            report.skip(where, Skipped("sample: none", str(e)))
            continue
        pixels = [fit(images.decode(data), side) for data in sample.images]
        shown.append(Preview(where, sample_text(sample, chat), pixels))
        if len(shown) == count:
            break
    report.records = {"shown": len(shown)}
    return shown, report


def sample_text(sample: samples.Sample, chat: chat_format.ChatFormat) -> str:
    """The tokens of a sample as text: targets between « and », an image as its positions."""
    is_target = np.r_[False, sample.target_mask[:-1]]  # the mask is of the next position
    is_image = np.isin(sample.tokens, (chat.image_id, chat.gen_id))
    parts, begin = [], 0
    keys = zip(is_target.tolist(), is_image.tolist(), strict=True)
    for (target, image), run in itertools.groupby(keys):
        end = begin + len(list(run))
        ids, begin = sample.tokens[begin:end].tolist(), end
        if image:
            parts.append(f"[image, {len(ids)} positions]")
            continue
        text = chat.tokenizer.decode(ids, skip_special_tokens=False)
        parts.append(f"{OPEN}{text}{CLOSE}" if target else text)
    return "".join(parts)


def sheet(previews: Sequence[Preview]) -> UInt8[np.ndarray, "H W 3"]:
    """A row a sample: its place and its images as the model sees them."""
    rows = [p for p in previews if p.images]
    across = min(max((len(p.images) for p in rows), default=1), _ACROSS)
    width = max(across, 2) * (_CELL + 8)  # two at least, for the name of the place
    page = Image.new("RGB", (width, max(len(rows), 1) * (_CELL + 20)), "white")
    pen = ImageDraw.Draw(page)
    for i, row in enumerate(rows):
        top = i * (_CELL + 20)
        hidden = len(row.images) - _ACROSS
        title = row.where + (f"  (and {hidden} more)" if hidden > 0 else "")
        pen.text((4, top + 3), title.encode("ascii", "replace").decode(), fill="black")
        for j, pixels in enumerate(row.images[:_ACROSS]):
            small = Image.fromarray(pixels).resize((_CELL, _CELL), Image.Resampling.BICUBIC)
            page.paste(small, (j * (_CELL + 8) + 4, top + 18))
    return np.asarray(page)
