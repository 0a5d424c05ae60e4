"""Conversations as JSON: LLaVA's `image` and `conversations`, ShareGPT's, and role/content turns.

A JSON array (.json) or JSON lines (.jsonl, .jsonl.gz). `<image>` in a question marks its image.
Conversations without images are records too.
"""

from __future__ import annotations

from collections.abc import Iterator

from etils import epath

from janusflow_jax.data.prepare import inputs, records
from janusflow_jax.data.prepare.inputs import Skipped
from janusflow_jax.data.prepare.records import Options

SUFFIXES = (".json", ".jsonl", ".jsonl.gz")


def plan(options: Options, slices: epath.Path) -> Iterator[dict]:
    """Shards: slices of the conversations."""
    rows = (
        row
        for path, name in inputs.files(options.inputs, SUFFIXES)
        for row in (inputs.json_array if name.endswith(".json") else inputs.json_lines)(path, name)
    )
    return inputs.write_slices(rows, slices, options.shard_records)


def read(shard: dict, options: Options, slices: epath.Path) -> Iterator[records.Item]:
    """The conversations of one slice."""

    def resolve(name: object) -> epath.Path:
        path = records.image_path(options.images or ".", name)
        if not options.images:
            raise Skipped("picture: missing", f"{name}: `images` is the folder of the images")
        return path

    return records.convert(
        inputs.read_slice(slices / shard["slice"]),
        lambda row, place_id: records.raw_record(row, place_id, options, resolve),
    )
