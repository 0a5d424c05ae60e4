"""What a person reads: the report of what was skipped and why, and a preview of samples."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8

from janusflow_jax.config.errors import DataError
from janusflow_jax.data import chat_format, images, samples
from janusflow_jax.data.prepare.inputs import Skipped

EXAMPLES = 5
"""The report names the first few places of each reason."""
OPEN, CLOSE = "«", "»"
"""Around the tokens that are targets, in the text of a preview."""

HINTS = {
    "image: missing": "`image_field` names the field or member, `images` the folder",
    "image: more than one": "`image_field` chooses one; `kind` conversation reads several",
    "image: in another field": "`image_field` names the field to read; others are then left out",
    "image: not JPEG, PNG or WebP": "convert them (ImageMagick: `mogrify -format png FILES`)",
    "image: outside its folder": "`images` names the folder that holds all images",
    "image: a web address, not a file": "download the images first, for example with img2dataset",
    "image: too small": "`min_side` is the limit",
    "image: too long and thin": "`max_aspect` is the limit",
    "image: too many pixels": "`max_pixels` is the limit",
    "image: too many bytes": "`max_bytes` is the limit",
    "images: more than their marks": "`image_marker` is the mark of an image in the text",
    "images: fewer than their marks": "`image_field` names the field of the images",
    "video: not read": "only images and texts are; store frames as images",
    "audio: not read": "only images and texts are; leave these records out",
    "caption: missing": "`text_field` names its field; in a folder it is a .txt file, or in `rows`",
    "caption: not text": "`text_field` may name a field in a field: sentences/raw",
    "caption: class without a name": "`classes` is the file of the names",
    "caption: too long": "`max_chars` is the limit",
    "turn: too long": "`max_chars` is the limit",
    "conversation: missing": "`text_field` names its field; `kind` is another kind of record",
    "text: missing": "`text_field` names its field; `kind` is another kind of record",
    "id: missing": "`id_field` names the field",
    "id: duplicate": "`ids` place makes ids from file and place",
    "file: not a JSON array": "the name of a file of JSON lines ends with .jsonl",
}
"""Reason -> what helps; names of options in backticks."""
_HINTS_OF_ENDS = {
    "Git LFS pointer": "run `git lfs pull` where the files came from",
    "not UTF-8": "save the file as UTF-8",
}

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
        _add(self.skipped, why.reason, 1, [[_printable(where), _printable(why.detail)]])

    def drop_caption(self, where: str, why: Skipped) -> None:
        _add(self.dropped, why.reason, 1, [[_printable(where), _printable(why.detail)]])

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
        dropped = sum(entry["count"] for entry in self.dropped.values())
        lines += [f"skipped: {self.num_skipped:,}", *_table(self.skipped)]
        if dropped:
            lines += [f"captions dropped from records that have others: {dropped:,}"]
            lines += _table(self.dropped)
        return "\n".join(lines)


def _printable(text: str) -> str:
    """The begin of a text. Names of files may hold half characters, which no terminal takes."""
    return text[:200].encode("utf-8", "replace").decode()


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
        if hint := HINTS.get(reason) or _HINTS_OF_ENDS.get(reason.partition(": ")[2]):
            lines.append(f"{'':>14}-> {hint}")
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
    report, previews = Report(), []
    fit = images.for_generation if task == "generate" else images.for_understanding
    side = round(chat.num_image_tokens**0.5) * 16  # a patch of SigLIP has 16 pixels
    for where, record in records:
        if isinstance(record, Skipped):
            report.skip(where, record)
            continue
        fields, _ = record
        try:
            sample = samples.encode(fields, task, form, chat, choose=lambda _: 0)
        except DataError as e:
            report.skip(where, Skipped("sample: none", str(e)))
            continue
        pixels = [fit(images.decode(data), side) for data in sample.images]
        previews.append(Preview(where, sample_text(sample, chat), pixels))
        if len(previews) == count:
            break
    report.records = {"shown": len(previews)}
    return previews, report


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
    """A row for each sample, with its first four images as the model sees them."""
    rows = [preview.images[:4] for preview in previews]
    side = next(len(row[0]) for row in rows if row)
    page = np.full((len(rows) * side, max(map(len, rows)) * side, 3), 255, np.uint8)
    for i, row in enumerate(rows):
        for j, pixels in enumerate(row):
            page[i * side : (i + 1) * side, j * side : (j + 1) * side] = pixels
    return page
