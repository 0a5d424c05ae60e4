"""Conversations as JSON: LLaVA's `image` and `conversations`, ShareGPT's, and role/content turns.

A JSON array (.json) or JSON lines (.jsonl, .gz too). `<image>` in a question marks its picture;
records without pictures are conversations too.
"""

from __future__ import annotations

from collections.abc import Iterator

from etils import epath

from janusflow_jax.data.prepare import fields, inputs, lines, pictures
from janusflow_jax.data.prepare.raw import Options, Raw, Skip, Skipped

SUFFIXES = (".json", ".jsonl", ".jsonl.gz")


def plan(options: Options, slices: epath.Path) -> Iterator[dict]:
    """Shards: slices of the conversations."""
    found = inputs.files(options, SUFFIXES)
    entries = (entry for path, name in found for entry in _entries(path, name))
    return inputs.write_slices(entries, slices, options.shard_records)


def read(shard: dict, options: Options, slices: epath.Path) -> Iterator[Raw | Skip]:
    """The conversations of one slice."""
    for where, place_id, row in inputs.read_slice(slices / shard["slice"]):
        try:
            if isinstance(row, Skipped):
                raise row
            yield fields.raw(row, where, place_id, options, lambda v: _picture(options, v))
        except Skipped as e:
            yield Skip(where, e.reason, e.detail)


def _picture(options: Options, name: object) -> epath.Path:
    path = pictures.inside(options.images or ".", name)
    if not options.images:
        raise Skipped("picture: missing", f"{name}: --images names the folder of the pictures")
    return path


def _entries(path: epath.Path, name: str) -> Iterator[inputs.Entry]:
    if not name.endswith(".json"):
        number = 0
        try:
            for number, (_, line) in enumerate(lines.lines(path), 1):
                if line.strip():
                    yield f"{name}:{number}", f"{name}-{number}", _parsed(line)
        except lines.BROKEN as e:
            yield f"{name}:{number + 1}", "", Skipped("file: truncated or broken", str(e))
        except Skipped as e:
            yield name, "", e
        return
    try:
        data = inputs.read_bytes(path, "file").removeprefix(b"\xef\xbb\xbf")
    except Skipped as e:
        yield name, "", e
        return
    if not data.strip():
        yield name, name, Skipped("file: empty")
        return
    text = data.decode("utf-8", errors="surrogateescape")  # the check of texts names such bytes
    for number, (at, row) in enumerate(lines.array(text)):
        yield f"{name}@{at}", f"{name}-{number}", row


def _parsed(line: bytes) -> object:
    try:
        return lines.parse(line)
    except Skipped as e:
        return e
