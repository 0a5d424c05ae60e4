"""Plain text: .txt (a document a line, or a file) and .jsonl with a field `text`; also as .gz."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from etils import epath

from janusflow_jax.data.prepare import inputs, records
from janusflow_jax.data.prepare.inputs import Row, Skipped
from janusflow_jax.data.prepare.records import Options, RawRecord

SUFFIXES = (".txt", ".jsonl", ".txt.gz", ".jsonl.gz")


def plan(options: Options, slices: epath.Path) -> Iterator[dict]:
    """Shards: byte ranges of large files, whole .gz files, or slices of a list of small files."""
    documents, others = [], []
    for path, name in inputs.files(options.inputs, SUFFIXES):
        is_document = options.documents == "file" and not _is_json(name)
        (documents if is_document else others).append((path, name))
    rows = ((name, name, {"path": str(path)}) for path, name in documents)
    yield from inputs.write_slices(rows, slices, options.shard_records)
    for path, name in others:
        shard = {"path": str(path), "name": name}
        if name.endswith(".gz") or path.is_dir():
            yield shard | {"begin": 0, "end": -1}
            continue
        size, step = path.stat().length, options.shard_bytes
        for begin in range(0, max(size, 1), step):
            yield shard | {"begin": begin, "end": min(begin + step, size)}


def read(shard: dict, options: Options, slices: epath.Path) -> Iterator[records.Item]:
    """The documents of one shard."""
    limit = 4 * options.max_document  # a character has up to 4 bytes
    if "slice" in shard:

        def document(row: Any, place_id: str) -> RawRecord:
            return RawRecord(place_id, content=_document(epath.Path(row["path"]), limit))

        return records.convert(inputs.read_slice(slices / shard["slice"]), document)

    def json_record(line: bytes, place_id: str) -> RawRecord:
        return records.raw_record(inputs.parse_json(line), place_id, options)

    def line_record(line: bytes, place_id: str) -> RawRecord:
        return RawRecord(place_id, content=line)

    is_json = _is_json(shard["name"])
    return records.convert(_lines(shard, limit), json_record if is_json else line_record)


def _is_json(name: str) -> bool:
    return name.removesuffix(".gz").endswith(".jsonl")


def _lines(shard: dict, limit: int) -> Iterator[Row]:
    """The lines of a shard that are not blank."""
    name, offset, empty = shard["name"], -1, True
    try:
        for offset, line in inputs.lines(
            epath.Path(shard["path"]), shard["begin"], shard["end"], limit
        ):
            if line.strip():
                empty = False
                yield f"{name}@{offset}", f"{name}@{offset}", line
    except inputs.BROKEN as e:
        yield f"{name}@{offset}", "", Skipped("file: truncated or broken", str(e))
        return
    except Skipped as e:
        yield f"{name}@{offset}", "", e
        return
    if empty and shard["begin"] == 0:
        yield name, "", Skipped("file: empty")


def _document(path: epath.Path, limit: int) -> bytes:
    """The bytes of a whole file; of a file with more than `limit`, enough to be reported."""
    parts: list[bytes] = []
    size = 0
    try:
        for _, line in inputs.lines(path, limit=limit):
            parts.append(line)
            size += len(line)
            if size > limit:
                break
    except inputs.BROKEN as e:
        raise Skipped("file: truncated or broken", str(e)) from e
    return b"\n".join(parts)
