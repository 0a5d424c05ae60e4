"""Plain text: .txt (a document a line, or a file), and JSON lines with a field `text`; also as .gz.

JSON lines are named .jsonl, .ndjson or, as C4's, .json.
"""

from __future__ import annotations

from collections.abc import Iterator

from etils import epath

from janusflow_jax.config import files
from janusflow_jax.data.prepare import inputs
from janusflow_jax.data.prepare.inputs import Row, Skipped
from janusflow_jax.data.prepare.records import Options

KINDS = ("text",)
_JSON = (".jsonl", ".ndjson", ".json")
SUFFIXES = tuple(x + gz for x in (".txt", *_JSON) for gz in ("", ".gz"))


def plan(options: Options, slices: epath.Path) -> Iterator[dict]:
    """Shards: byte ranges of large files, whole .gz or UTF-16 files, slices of a list of files."""
    documents, others = [], []
    for path, name in inputs.files(options.inputs, SUFFIXES):
        is_document = options.documents == "file" and not _is_json(name)
        (documents if is_document else others).append((path, name))
    rows = ((name, name, {"path": str(path)}) for path, name in documents)
    yield from inputs.write_slices(rows, slices, options.shard_records)
    for path, name in others:
        shard = {"path": str(path), "name": name}
        if name.lower().endswith(".gz") or _is_wide(path):
            yield shard | {"begin": 0, "end": -1}
            continue
        size, step = files.size(path), options.shard_bytes
        for begin in range(0, max(size, 1), step):
            yield shard | {"begin": begin, "end": min(begin + step, size)}


def read(shard: dict, options: Options) -> Iterator[Row]:
    """The documents of one shard: the files of a slice, or the lines that are not blank."""
    if "slice" in shard:
        for where, place_id, row in inputs.read_slice(shard["slice"]):
            yield where, place_id, {"text": epath.Path(row["path"])}
        return
    is_json = _is_json(shard["name"])
    for offset, line in inputs.lines(epath.Path(shard["path"]), shard["begin"], shard["end"]):
        if line.strip():
            place = f"{shard['name']}@{offset}"
            yield place, place, inputs.parse_json(line) if is_json else {"text": line}


def _is_wide(path: epath.Path) -> bool:
    try:
        with inputs.open_file(path) as stream:
            return bool(inputs.wide_encoding(stream))
    except Skipped:  # `read` reports it
        return False


def _is_json(name: str) -> bool:
    return name.lower().removesuffix(".gz").endswith(_JSON)
