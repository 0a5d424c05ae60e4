"""Parquet in the usual forms of Hugging Face data sets.

Pictures are struct{bytes, path} or bytes, one or a list; texts are a caption, captions, a text, or
turns (`conversations`, `messages`, `texts`). The only file that imports pyarrow (extra `data`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from etils import epath

from janusflow_jax.config.errors import DataError
from janusflow_jax.data.prepare import fields, inputs
from janusflow_jax.data.prepare.raw import Options, Raw, Skip, Skipped

SUFFIXES = (".parquet",)
_BATCH = 32
"""Rows that are in memory at once, with their pictures."""


def plan(options: Options, slices: epath.Path) -> Iterator[dict]:
    """Shards: row groups in a row, options.shard_records rows or more together."""
    del slices
    for path, name in inputs.files(options, SUFFIXES):
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


def read(shard: dict, options: Options, slices: epath.Path) -> Iterator[Raw | Skip]:
    """The rows of one shard; of a row group with a broken page, those in front of it."""
    del slices
    name = shard["name"]
    if "skip" in shard:
        yield Skip(name, *shard["skip"])
        return
    try:
        with _open(epath.Path(shard["path"])) as file:
            first_row = shard["first_row"]
            for group in range(shard["begin"], shard["end"]):
                yield from _group(file, group, first_row, name, options)
                first_row += file.metadata.row_group(group).num_rows
    except Skipped as e:
        yield Skip(name, e.reason, e.detail)


def guess_kind(options: Options) -> str:
    """conversation, captions, document or text, by the columns of the first file that opens."""
    for path, _ in inputs.files(options, SUFFIXES):
        try:
            with _open(path) as file:
                names = list(file.schema_arrow.names)
        except Skipped:
            continue
        image = fields.find(names, options.image_field, fields.IMAGE)
        if fields.find(names, "", fields.TURNS):
            return "conversation"
        return "captions" if image else "text"
    return "captions"


def _pyarrow() -> Any:
    try:
        import pyarrow  # pyright: ignore[reportMissingImports]
        import pyarrow.parquet  # pyright: ignore[reportMissingImports]
    except ImportError as e:
        raise DataError(
            "parquet: expected the package pyarrow; it is not installed: "
            "pip install 'janusflow_jax[data]'"
        ) from e
    return pyarrow


class _open:
    """A Parquet file, and the stream below it, as a context. Raises Skipped where it is none."""

    def __init__(self, path: epath.Path):
        pyarrow = _pyarrow()
        self.stream = inputs.open_file(path)
        try:
            self.file = pyarrow.parquet.ParquetFile(self.stream)
        except (pyarrow.ArrowException, OSError) as e:
            self.stream.close()
            raise Skipped("file: truncated or broken", str(e)[:160]) from e

    def __enter__(self) -> Any:
        return self.file

    def __exit__(self, *error: object) -> None:
        self.stream.close()


def _group(
    file: Any, group: int, first_row: int, name: str, options: Options
) -> Iterator[Raw | Skip]:
    pyarrow = _pyarrow()
    number = first_row
    size = file.metadata.row_group(group).num_rows
    columns = _columns(file.schema_arrow.names, options)
    batches = file.iter_batches(batch_size=_BATCH, row_groups=[group], columns=columns)
    try:
        for batch in batches:
            for row in _rows(batch):
                where, place_id = f"{name}:{number}", f"{name}-{number}"
                number += 1
                try:
                    if isinstance(row, Skipped):
                        raise row
                    yield fields.raw(row, where, place_id, options, fields.embedded)
                except Skipped as e:
                    yield Skip(where, e.reason, e.detail)
    except (pyarrow.ArrowException, OSError) as e:
        for lost in range(number, first_row + size):
            yield Skip(f"{name}:{lost}", "file: truncated or broken", str(e)[:160])


def _rows(batch: Any) -> Iterator[Any]:
    """Python rows; one whose text is no UTF-8 (Arrow does not check) is a Skipped."""
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
    """What `fields.raw` may look at; the rest is not read."""
    given = (options.image_field, options.text_field, options.id_field)
    usual = (*fields.ID, *fields.CAPTION, *fields.TEXT, *fields.TURNS)
    if options.kind != "text":
        usual += fields.IMAGE
    return [name for name in names if name in (*given, *usual)]
