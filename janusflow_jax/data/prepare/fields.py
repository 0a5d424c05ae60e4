"""A row of a table or a JSON object -> a raw record, by the names that people give to fields."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from janusflow_jax.data.prepare.raw import Options, Raw, Skipped

ID = ("id", "key", "__key__", "uid")
IMAGE = (
    "image",
    "images",
    "file_name",
    "filename",
    "path",
    "img",
    "picture",
    "image_path",
    "image_bytes",
    "jpg",
    "jpeg",
    "png",
    "webp",
)
CAPTION = ("captions", "caption", "text", "txt", "sentence", "sentences", "description", "prompt")
TEXT = ("text", "content", "document", "body")
DOCUMENT = (*TEXT, "texts")
TURNS = ("conversations", "conversation", "messages", "texts")


def find(names: Iterable[str], given: str, usual: tuple[str, ...]) -> str:
    """The field that is meant: the given one, or the first of the usual ones; '' for none."""
    names = list(names)
    if given:
        return given if given in names else ""
    return next((name for name in usual if name in names), "")


def raw(
    row: Any, where: str, place_id: str, options: Options, picture: Callable[[Any], Any]
) -> Raw:
    """The fields of a row that the kind of data set needs.

    Args:
      row: a JSON object or a table's row.
      where: file and place.
      place_id: the id where the row has none, or options.ids is 'place'.
      picture: what stands in a picture field (a path, bytes, {bytes, path}) -> bytes or a path.
    Raises:
      Skipped: the row is no object, or a picture cannot be found.
    """
    if not isinstance(row, dict):
        raise Skipped("row: not an object", type(row).__name__)
    names = [name for name, value in row.items() if not _is_null(value)]
    kind = options.kind
    image = find(names, options.image_field, IMAGE) if kind != "text" else ""
    value = row[image] if image else []
    given = value if isinstance(value, (list, tuple)) else [value]
    found = find(names, options.id_field, ID)
    record_id = row[found] if found and options.ids == "given" else place_id
    if isinstance(record_id, float) and record_id.is_integer():
        record_id = int(record_id)  # a column of numbers with gaps is read as floats
    usual = {"captions": CAPTION, "conversation": TURNS, "document": DOCUMENT}.get(kind, TEXT)
    text = find(names, options.text_field, usual)
    content = row[text] if text else None
    if kind == "document" and isinstance(content, (list, tuple)):
        given = [one for one in given if not _is_null(one)]
        content = _joined(content, options.image_marker)
    return Raw(
        where,
        record_id,
        [picture(one) for one in given],
        captions=content if kind == "captions" else None,
        turns=content if kind == "conversation" else None,
        text=content if kind in ("document", "text") else None,
    )


def embedded(value: Any) -> bytes:
    """The bytes of a picture in a table: bytes, or a dict {bytes, path}.

    Raises:
      Skipped: no bytes.
    """
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


def _joined(parts: Sequence[Any], marker: str) -> str:
    """OBELICS' texts: where a text is null a picture stands."""
    for part in parts:
        if not (_is_null(part) or isinstance(part, str)):
            raise Skipped("text: not text", f"part {type(part).__name__} {str(part)[:40]}")
    return "\n".join(marker if _is_null(part) else part for part in parts)


def _is_null(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))
