"""Conversations as JSON: LLaVA's `image` and `conversations`, ShareGPT's, and role/content turns.

A JSON array (.json) or JSON lines (.jsonl, .jsonl.gz). `<image>` in a question marks its image.
Conversations without images are records too.
"""

from __future__ import annotations

from collections.abc import Iterator

from etils import epath

from janusflow_jax.data.prepare import inputs
from janusflow_jax.data.prepare.inputs import Row
from janusflow_jax.data.prepare.records import Options

KINDS = ("conversation",)
SUFFIXES = (".json", ".jsonl", ".jsonl.gz")


def plan(options: Options, slices: epath.Path) -> Iterator[dict]:
    """Shards: slices of the conversations."""
    files = inputs.files(options.inputs, SUFFIXES)
    rows = (row for path, name in files for row in inputs.json_rows(path, name))
    return inputs.write_slices(rows, slices, options.shard_records)


def read(shard: dict, options: Options) -> Iterator[Row]:
    """The conversations of one slice."""
    del options
    return inputs.read_slice(shard["slice"])
