"""Plain text: .txt (a document a line, or a file), .jsonl with `text`, both as .gz too."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from etils import epath

from janusflow_jax.data.prepare import fields, inputs, lines
from janusflow_jax.data.prepare.raw import Options, Raw, Skip, Skipped

SUFFIXES = (".txt", ".jsonl", ".txt.gz", ".jsonl.gz")


def plan(options: Options, slices: epath.Path) -> Iterator[dict]:
    """Shards: stretches of bytes of large files, whole .gz files, or many small files at once."""
    found = inputs.files(options, SUFFIXES)
    whole = [(p, name) for p, name in found if _is_document(name, options)]
    entries = ((name, name, {"path": str(path)}) for path, name in whole)
    yield from inputs.write_slices(entries, slices, options.shard_records)
    for path, name in found:
        if _is_document(name, options):
            continue
        shard = {"path": str(path), "name": name}
        if name.endswith(".gz") or path.is_dir():
            yield shard | {"begin": 0, "end": -1}
            continue
        size = path.stat().length
        step = options.shard_bytes
        for begin in range(0, max(size, 1), step):
            yield shard | {"begin": begin, "end": min(begin + step, size)}


def read(shard: dict, options: Options, slices: epath.Path) -> Iterator[Raw | Skip]:
    """The documents of one shard."""
    if "slice" in shard:
        for where, place_id, row in inputs.read_slice(slices / shard["slice"]):
            yield _whole(epath.Path(row["path"]), where, place_id, options)
        return
    path, name = epath.Path(shard["path"]), shard["name"]
    is_json = name.removesuffix(".gz").endswith(".jsonl")
    limit = 4 * options.max_document  # bytes of a character in UTF-8
    at, empty = -1, True
    try:
        for at, line in lines.lines(path, shard["begin"], shard["end"], limit):
            if not line.strip():
                continue
            empty = False
            yield _line(line, is_json, f"{name}@{at}", options)
    except (*lines.BROKEN, Skipped) as e:
        broken = e if isinstance(e, Skipped) else Skipped("file: truncated or broken", str(e))
        yield Skip(f"{name}@{at}", broken.reason, broken.detail)
        return
    if empty and shard["begin"] == 0:
        yield Skip(name, "file: empty")


def _is_document(name: str, options: Options) -> bool:
    return options.documents == "file" and name.removesuffix(".gz").endswith(".txt")


def _line(line: bytes, is_json: bool, where: str, options: Options) -> Raw | Skip:
    if not is_json:
        return Raw(where, where, text=line)
    try:
        row: Any = lines.parse(line.removeprefix(b"\xef\xbb\xbf"))
        return fields.raw(row, where, where, options, lambda v: v)
    except Skipped as e:
        return Skip(where, e.reason, e.detail)


def _whole(path: epath.Path, where: str, place_id: str, options: Options) -> Raw | Skip:
    parts: list[bytes] = []
    size, limit = 0, 4 * options.max_document
    try:
        for _, line in lines.lines(path, limit=limit):
            parts.append(line)
            size += len(line)
            if size > limit:  # more than is kept; the check of texts says so
                break
    except lines.BROKEN as e:
        return Skip(where, "file: truncated or broken", str(e))
    except Skipped as e:
        return Skip(where, e.reason, e.detail)
    return Raw(where, place_id, text=b"\n".join(parts))
