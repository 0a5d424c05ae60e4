"""Parquet in the usual layouts of Hugging Face data sets.

Images are struct{bytes, path} or bytes, one or a list. Texts are a caption, captions, a text, or
turns (`conversations`, `messages`, `texts`). The only file that imports pyarrow (extra `data`).
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from typing import Any

from etils import epath

from janusflow_jax.config.errors import DataError
from janusflow_jax.data.prepare import inputs, records
from janusflow_jax.data.prepare.inputs import Row, Skipped
from janusflow_jax.data.prepare.records import Options

KINDS = records.KINDS
SUFFIXES = (".parquet",)
_BATCH = 32
"""Rows that are in memory at once, with their images."""


def plan(options: Options, slices: epath.Path) -> Iterator[dict]:
    """Shards: consecutive row groups, together at least `shard_records` rows."""
    del slices
    for path, name in inputs.files(options.inputs, SUFFIXES):
        shard = {"path": str(path), "name": name}
        sizes = []
        with contextlib.suppress(Skipped), _open(path) as file:
            sizes = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
        if not sum(sizes):  # empty or broken: `read` reports it
            yield shard
            continue
        begin = rows = first_row = 0
        for i, size in enumerate(sizes):
            rows += size
            if rows >= options.shard_records or i + 1 == len(sizes):
                yield shard | {"begin": begin, "end": i + 1, "first_row": first_row}
                begin, first_row, rows = i + 1, first_row + rows, 0


def read(shard: dict, options: Options) -> Iterator[Row]:
    """The rows of one shard; of a shard with a broken page, the rows before the break.

    Raises:
      Skipped: the file is missing or broken.
    """
    name, number = shard["name"], shard.get("first_row", 0)
    with _open(epath.Path(shard["path"])) as file:
        columns = _columns(file.schema_arrow, options)
        for group in range(shard.get("begin", 0), shard.get("end", file.num_row_groups)):
            for batch in file.iter_batches(_BATCH, row_groups=[group], columns=columns):
                for i in range(batch.num_rows):
                    try:
                        row = batch.slice(i, 1).to_pylist()[0]
                    except UnicodeDecodeError as e:  # Arrow does not check that text is UTF-8
                        row = Skipped("row: not UTF-8", str(e)[:120])
                    yield f"{name}:{number}", f"{name}-{number}", row
                    number += 1


def all_columns(path: epath.Path) -> Iterator[tuple[int, int, dict[str, Any]]]:
    """The rows of a file with all of its columns: row group, place in it, row.

    Raises:
      Skipped: the file is missing or broken.
    """
    with _open(path) as file:
        for group in range(file.num_row_groups):
            number = 0
            for batch in file.iter_batches(_BATCH, row_groups=[group]):
                for row in batch.to_pylist():
                    yield group, number, row
                    number += 1


def column(path: epath.Path, group: int, name: str) -> list[Any]:
    """A column of a row group.

    Raises:
      Skipped: the file is missing or broken.
    """
    with _open(path) as file:
        return file.read_row_group(group, columns=[name]).column(name).to_pylist()


def guess_kind(paths: Sequence[str], image_field: str = "") -> str:
    """conversation, captions or text, by the columns of the first file that opens."""
    for path, _ in inputs.files(paths, SUFFIXES):
        with contextlib.suppress(Skipped), _open(path) as file:
            names = file.schema_arrow.names
            if records.field_of(names, "", records.CONTENT_FIELDS["conversation"]):
                return "conversation"
            has_image = records.field_of(names, image_field, records.IMAGE_FIELDS)
            return "captions" if has_image else "text"
    return "captions"


@contextlib.contextmanager
def _open(path: epath.Path) -> Iterator[Any]:
    """A Parquet file. Raises Skipped if it is missing or broken."""
    try:
        import pyarrow  # pyright: ignore[reportMissingImports]
        import pyarrow.parquet  # pyright: ignore[reportMissingImports]
    except ImportError as e:
        raise DataError(
            "parquet: expected the package pyarrow; it is not installed: run "
            "`pip install 'janusflow_jax[data]'`"
        ) from e
    with inputs.open_file(path, broken=(pyarrow.ArrowException,)) as stream:
        try:
            yield pyarrow.parquet.ParquetFile(stream)
        except OSError as e:
            if e.errno is not None:  # of the store; pyarrow's own, for broken pages, have none
                raise
            raise Skipped("file: truncated or broken", str(e)[:160]) from e


def _columns(schema: Any, options: Options) -> list[str]:
    """The columns that `records.to_record` may look at; the others are not read."""
    wanted = {options.image_field, options.text_field, options.id_field, *records.ID_FIELDS}
    wanted.add(options.text_field.partition("/")[0])
    wanted |= {name for usual in records.CONTENT_FIELDS.values() for name in usual}
    if options.kind != "text":
        wanted |= {*records.IMAGE_FIELDS}
        words = [word for words, _ in records.MEDIA.values() for word in words]
        for field in schema:  # of numbers, such as an embedding, would be none
            is_medium = any(word in field.name.lower() for word in words)
            if is_medium and re.search("binary|string", str(field.type)):
                wanted.add(field.name)
    return [name for name in schema.names if name in wanted]
