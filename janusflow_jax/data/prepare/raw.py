"""What an importer reads, before it is checked: raw records, and why something is left out.

An importer is a module with two functions:

    plan(options, slices) -> shards                 what there is to read, in a fixed order
    read(shard, options, slices) -> raws and skips  one piece; records stay in their order

A shard is a dict that JSON can hold. `slices` is a folder for rows that `plan` has read and cut up
for the workers (`inputs.write_slices`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

KINDS = ("captions", "conversation", "document", "text")
"""What the records of a data set hold; see `data/samples.py`."""


class Skipped(Exception):
    """A record that cannot be used: `reason` is one of few, `detail` says what was found."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(f"{reason} ({detail})" if detail else reason)
        self.reason, self.detail = reason, detail


@dataclasses.dataclass(frozen=True)
class Skip:
    """Something that was left out: where it stands, why, and what was found."""

    where: str
    reason: str
    detail: str = ""


@dataclasses.dataclass(frozen=True)
class Raw:
    """A record as it was found. Values may be anything; `transform.record` checks them."""

    where: str  # file and place, for the report
    id: Any
    images: Sequence[Any] = ()  # bytes or a path each
    captions: Any = None
    turns: Any = None
    text: Any = None


@dataclasses.dataclass(frozen=True)
class Options:
    """How a data set is prepared. With the same options and inputs the same files come out."""

    form: str  # folder | webdataset | parquet | llava | text
    inputs: tuple[str, ...]
    kind: str = "captions"
    images: str = ""  # folder that the paths of pictures are relative to
    rows: str = ""  # folder form: a JSON-lines or CSV file that names the pictures
    image_field: str = ""  # '': the usual names (fields.py)
    text_field: str = ""
    id_field: str = ""
    classes: tuple[str, ...] = ()  # names by number, for WebDataset's .cls
    ids: str = "given"  # given | place (file and place, where ids repeat from file to file)
    documents: str = "line"  # text form, .txt: line | file
    image_marker: str = "<image>"
    image_tag: str = "<image_placeholder>"
    heldout: float = 0.0  # share of the records, chosen by a hash of the id
    tokenizer: str = ""
    lengths: tuple[str, ...] = ()  # TASK:FORM
    max_side: int = 0  # pixels; longer pictures are shrunk; 0: kept as they are
    min_side: int = 16
    max_aspect: float = 20.0
    max_pixels: int = 100_000_000
    max_bytes: int = 64 * 2**20
    max_chars: int = 100_000  # of a caption or a turn
    max_document: int = 50_000_000  # characters of a document
    shard_records: int = 4096
    shard_bytes: int = 256 * 2**20  # of text files
