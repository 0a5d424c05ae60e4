"""Parquet in the usual layouts of Hugging Face data sets.

Images are struct{bytes, path} or bytes, one or a list. Texts are a caption, captions, a text, or
turns (`conversations`, `messages`, `texts`). The only file that imports pyarrow (extra `data`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from etils import epath

from janusflow_jax.config.errors import DataError
from janusflow_jax.data.prepare import inputs, records
from janusflow_jax.data.prepare.inputs import Row, Skipped
from janusflow_jax.data.prepare.records import Options

SUFFIXES = (".parquet",)
_BATCH = 32
"""Rows that are in memory at once, with their images."""


def plan(options: Options, slices: epath.Path) -> Iterator[dict]:
    """Shards: consecutive row groups, together at least `shard_records` rows."""
    del slices
    for path, name in inputs.files(options.inputs, SUFFIXES):
        shard = {"path": str(path), "name": name}
        try:
            with _open(path) as file:
                sizes = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
        except Skipped as e:
            yield shard | {"skip": [e.reason, e.detail]}
            continue
        if not sum(sizes):
            yield shard | {"skip": ["file: empty", "no rows"]}
            continue
        begin = rows = first_row = 0
        for i, size in enumerate(sizes):
            rows += size
            if rows >= options.shard_records or i + 1 == len(sizes):
                yield shard | {"begin": begin, "end": i + 1, "first_row": first_row}
                begin, first_row, rows = i + 1, first_row + rows, 0


def read(shard: dict, options: Options, slices: epath.Path) -> Iterator[records.Item]:
    """The rows of one shard; of a row group with a broken page, the rows before the break."""
    del slices
    return records.convert(
        _rows(shard, options),
        lambda row, place_id: records.raw_record(row, place_id, options, _image_bytes),
    )


def guess_kind(paths: Sequence[str], image_field: str = "") -> str:
    """conversation, captions or text, by the columns of the first file that opens."""
    for path, _ in inputs.files(paths, SUFFIXES):
        try:
            with _open(path) as file:
                names = list(file.schema_arrow.names)
        except Skipped:
            continue
        if records.field_of(names, "", records.CONTENT_FIELDS["conversation"]):
            return "conversation"
        has_image = records.field_of(names, image_field, records.IMAGE_FIELDS)
        return "captions" if has_image else "text"
    return "captions"


def _pyarrow() -> Any:
    try:
        import pyarrow  # pyright: ignore[reportMissingImports]
        import pyarrow.parquet  # pyright: ignore[reportMissingImports]
    except ImportError as e:
        raise DataError(
            "parquet: expected the package pyarrow; it is not installed: run "
            "`pip install 'janusflow_jax[data]'`"
        ) from e
    return pyarrow


@contextlib.contextmanager
def _open(path: epath.Path) -> Iterator[Any]:
    """A Parquet file. Raises Skipped if it is not one."""
    pyarrow = _pyarrow()
    with inputs.open_file(path) as stream:
        try:
            file = pyarrow.parquet.ParquetFile(stream)
        except (pyarrow.ArrowException, OSError) as e:
            raise Skipped("file: truncated or broken", str(e)[:160]) from e
        yield file


def _rows(shard: dict, options: Options) -> Iterator[Row]:
    name = shard["name"]
    if "skip" in shard:
        yield name, "", Skipped(*shard["skip"])
        return
    try:
        with _open(epath.Path(shard["path"])) as file:
            first_row = shard["first_row"]
            for group in range(shard["begin"], shard["end"]):
                yield from _group_rows(file, group, first_row, name, options)
                first_row += file.metadata.row_group(group).num_rows
    except Skipped as e:
        yield name, "", e


def _group_rows(
    file: Any, group: int, first_row: int, name: str, options: Options
) -> Iterator[Row]:
    pyarrow = _pyarrow()
    number, end = first_row, first_row + file.metadata.row_group(group).num_rows
    columns = _columns(file.schema_arrow.names, options)
    try:
        for batch in file.iter_batches(batch_size=_BATCH, row_groups=[group], columns=columns):
            for row in _batch_rows(batch):
                yield f"{name}:{number}", f"{name}-{number}", row
                number += 1
    except (pyarrow.ArrowException, OSError) as e:
        for lost in range(number, end):
            yield f"{name}:{lost}", "", Skipped("file: truncated or broken", str(e)[:160])


def _batch_rows(batch: Any) -> Iterator[Any]:
    """Python rows. A row whose text is not UTF-8 (Arrow does not check) becomes a Skipped."""
    try:
        yield from batch.to_pylist()
        return
    except UnicodeDecodeError:
        pass
    for i in range(batch.num_rows):
        try:
            yield batch.slice(i, 1).to_pylist()[0]
        except UnicodeDecodeError as e:
            yield Skipped("row: not UTF-8", str(e)[:120])


def _columns(names: list[str], options: Options) -> list[str]:
    """The columns that `raw_record` may look at; the others are not read."""
    wanted = {options.image_field, options.text_field, options.id_field, *records.ID_FIELDS}
    wanted |= {name for usual in records.CONTENT_FIELDS.values() for name in usual}
    if options.kind != "text":
        wanted |= {*records.IMAGE_FIELDS}
    return [name for name in names if name in wanted]


def _image_bytes(value: Any) -> bytes:
    """The bytes of an image in a table: bytes, or a dict {bytes, path}."""
    if isinstance(value, dict):
        if value.get("bytes") is None:
            path = value.get("path")
            raise Skipped("picture: missing", f"no bytes in the row, path {path!r}"[:120])
        value = value["bytes"]
    if value is None:
        raise Skipped("picture: missing")
    if not isinstance(value, bytes):
        raise Skipped("picture: no bytes", f"{type(value).__name__} {str(value)[:40]}")
    return value
