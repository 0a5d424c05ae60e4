"""A folder of images: captions in .txt files of the same name, or rows that name the images.

Rows (`options.rows`) are JSON lines, a JSON array (.json), or a CSV file. A row holds the path of
an image in the folder and a caption or captions, or a list of images and a conversation or a
document.
"""

from __future__ import annotations

import csv
import io
import itertools
import unicodedata
from collections.abc import Iterator
from typing import Any

from etils import epath

from janusflow_jax.config.errors import DataError
from janusflow_jax.data.prepare import inputs, records
from janusflow_jax.data.prepare.inputs import Row, Skipped
from janusflow_jax.data.prepare.records import Options

KINDS = ("captions", "conversation", "document")


def plan(options: Options, slices: epath.Path) -> Iterator[dict]:
    """Shards: slices of the list of images, or of the rows."""
    if len(options.inputs) != 1 or not epath.Path(options.inputs[0]).is_dir():
        raise DataError(f"folder: expected one folder; got {', '.join(options.inputs)}")
    rows = epath.Path(options.rows)
    if not options.rows:
        entries = _pairs(epath.Path(options.inputs[0]))
    elif not rows.exists() or rows.is_dir():
        raise DataError(f"{rows}: expected a .jsonl or .csv file; no such file")
    elif rows.name.lower().endswith((".csv", ".tsv")):
        entries = _csv_rows(rows)
    else:
        entries = inputs.json_rows(rows, rows.name)
    return inputs.write_slices(entries, slices, options.shard_records)


def read(shard: dict, options: Options) -> Iterator[Row]:
    """The images or the rows of one slice."""
    root = epath.Path(options.images or options.inputs[0])
    for where, place_id, row in inputs.read_slice(shard["slice"]):
        if not options.rows and isinstance(row, dict):
            row = {"image": root / row["image"], "caption": root / row["txt"]}
        yield where, place_id, row


def _pairs(root: epath.Path) -> Iterator[Row]:
    """Images and their .txt files, by the name before the last dot, a folder at a time."""
    names = (name for _, name in inputs.walk(root))
    for _, siblings in itertools.groupby(names, lambda name: name.rpartition("/")[0]):
        stems: dict[str, tuple[list[str], list[str]]] = {}
        for name in siblings:
            stem, _, suffix = name.rpartition(".")
            stem = unicodedata.normalize("NFC", stem)  # macOS mixes two forms of a name
            suffix = f".{suffix.lower()}"
            if suffix == ".txt":
                stems.setdefault(stem, ([], []))[1].append(name)
            elif suffix in records.IMAGE_SUFFIXES:
                stems.setdefault(stem, ([], []))[0].append(name)
            else:
                yield name, name, Skipped("file: neither image nor .txt")
        for _, (images, texts) in sorted(stems.items(), key=lambda x: inputs.natural_key(x[0])):
            if not images:
                detail = f"expected an image beside {texts[0]}"
                yield texts[0], texts[0].rpartition(".")[0], Skipped("image: missing", detail)
            for image in images:  # a second image of this name is counted as a duplicate id
                stem = image.rpartition(".")[0]
                if texts:
                    yield image, stem, {"image": image, "txt": texts[0]}
                else:
                    detail = f"expected {stem}.txt beside it"
                    yield image, stem, Skipped("caption: missing", detail)


def _csv_rows(path: epath.Path) -> Iterator[Row]:
    csv.field_size_limit(2**28)
    try:
        text = inputs.decode(inputs.read_bytes(path, "file"))
    except Skipped as e:
        yield path.name, "", e
        return
    header = text.partition("\n")[0]
    separator = "\t" if path.name.lower().endswith(".tsv") else max(",;\t|", key=header.count)
    is_spaced = f"{separator} " in header
    lines = io.StringIO(text, newline="")
    reader = csv.DictReader(lines, delimiter=separator, skipinitialspace=is_spaced)
    reader.fieldnames = [name.strip() for name in reader.fieldnames or ()]
    while True:
        try:
            row: Any = next(reader, None)
        except csv.Error as e:  # the reader continues with the next line
            row = Skipped("line: not CSV", str(e))
        if row is None:
            return
        if isinstance(row, dict) and None in row:
            row = Skipped("line: more columns than the header", f"{len(row[None])} more")
        yield f"{path.name}:{reader.line_num}", f"{path.name}-{reader.line_num}", row
