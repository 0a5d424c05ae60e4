"""A folder of pictures: captions in .txt files of the same name, or rows that name the pictures.

Rows are JSON lines or a CSV file (options.rows) with a path relative to the folder and a caption or
captions, or a list of pictures and a conversation or a document.
"""

from __future__ import annotations

import csv
import io
import itertools
from collections.abc import Iterator
from typing import Any

from etils import epath

from janusflow_jax.config.errors import DataError
from janusflow_jax.data.prepare import fields, inputs, lines, pictures
from janusflow_jax.data.prepare.raw import Options, Raw, Skip, Skipped

_FIELD_LIMIT = 2**28


def plan(options: Options, slices: epath.Path) -> Iterator[dict]:
    """Shards: slices of the list of pictures, or of the rows."""
    if len(options.inputs) != 1 or not epath.Path(options.inputs[0]).is_dir():
        raise DataError(f"folder: expected one folder; got {', '.join(options.inputs)}")
    if options.rows and (
        not epath.Path(options.rows).exists() or epath.Path(options.rows).is_dir()
    ):
        raise DataError(f"{options.rows}: expected a .jsonl or .csv file; there is none")
    entries = _rows(options) if options.rows else _pairs(epath.Path(options.inputs[0]))
    return inputs.write_slices(entries, slices, options.shard_records)


def read(shard: dict, options: Options, slices: epath.Path) -> Iterator[Raw | Skip]:
    """The records of one slice."""
    root = options.images or options.inputs[0]
    limit = 4 * options.max_chars  # bytes of a character in UTF-8
    for where, place_id, row in inputs.read_slice(slices / shard["slice"]):
        try:
            if isinstance(row, Skipped):
                raise row
            if options.rows:
                yield fields.raw(row, where, place_id, options, lambda v: pictures.inside(root, v))
            else:
                path, text = (epath.Path(root) / row[key] for key in ("image", "txt"))
                yield Raw(
                    where, place_id, [path], captions=inputs.read_bytes(text, "caption", limit)
                )
        except Skipped as e:
            yield Skip(where, e.reason, e.detail)


def _pairs(root: epath.Path) -> Iterator[inputs.Entry]:
    """Pictures and their .txt files, by the name before the last dot, a folder at a time."""
    names = (name for _, name in inputs.walk(root))
    for _, here in itertools.groupby(names, lambda name: name.rpartition("/")[0]):
        stems: dict[str, tuple[list[str], list[str]]] = {}
        for name in here:
            stem, _, suffix = name.rpartition(".")
            kind = f".{suffix.lower()}"
            if kind == ".txt":
                stems.setdefault(stem, ([], []))[1].append(name)
            elif kind in pictures.SUFFIXES + pictures.REFUSED:
                stems.setdefault(stem, ([], []))[0].append(name)
            else:
                yield name, name, Skipped("file: neither picture nor .txt")
        for stem, (images, texts) in sorted(stems.items()):
            if not images:
                yield texts[0], stem, Skipped("picture: missing", f"no picture beside {texts[0]}")
            for image in images:  # a second picture of this name is a duplicate id, and counted so
                if texts:
                    yield image, stem, {"image": image, "txt": texts[0]}
                else:
                    yield image, stem, Skipped("caption: missing", f"no {stem}.txt")


def _rows(options: Options) -> Iterator[inputs.Entry]:
    path = epath.Path(options.rows)
    if path.name.lower().endswith((".csv", ".tsv")):
        yield from _csv_rows(path)
        return
    number = 0
    try:
        for number, (_, line) in enumerate(lines.lines(path), 1):
            where, place_id = f"{path.name}:{number}", f"{path.name}-{number}"
            if not line.strip():
                continue
            try:
                yield where, place_id, lines.parse(line.removeprefix(b"\xef\xbb\xbf"))
            except Skipped as e:
                yield where, place_id, e
    except lines.BROKEN as e:
        yield f"{path.name}:{number + 1}", "", Skipped("file: truncated or broken", str(e))


def _csv_rows(path: epath.Path) -> Iterator[inputs.Entry]:
    csv.field_size_limit(_FIELD_LIMIT)
    data = inputs.read_bytes(path, "file").removeprefix(b"\xef\xbb\xbf")
    # bytes that are no UTF-8 stay in their field, where the check of texts names them
    text = io.StringIO(data.decode("utf-8", errors="surrogateescape"), newline="")
    separator = "\t" if path.name.lower().endswith(".tsv") else ","
    reader = csv.DictReader(text, restkey="", delimiter=separator)
    while True:
        row: Any = None
        try:
            row = next(reader, None)
            if row is None:
                return
            if "" in row:
                row = Skipped("line: more columns than the header", f"{len(row[''])} more")
        except csv.Error as e:
            row = Skipped("line: not CSV", str(e))
        where = f"{path.name}:{reader.line_num}"
        yield where, f"{path.name}-{reader.line_num}", row
