"""Bad and odd Parquet files, as the `datasets` library writes them and as it would not.

A case is (name, how to make its file's bytes, what must come out of it).
"""

from __future__ import annotations

import io
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from helpers import scenes
from helpers.bad_folder import GOOD, JPG, MAX_CHARS

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
_HF = {b"huggingface": b'{"info": {"features": {"image": {"_type": "Image"}}}}'}


def table(rows: list[dict], types: dict[str, pa.DataType], **options: object) -> bytes:
    """A Parquet file of rows, with the metadata that `datasets` writes."""
    schema = pa.schema(list(types.items()), metadata=_HF)
    out = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), out, **options)
    return out.getvalue()


def rows(*changes: dict, **types: pa.DataType):
    """Rows with id, image and caption, each changed; `...` leaves a field null."""

    def make(name: str) -> bytes:
        known = {"id": pa.string(), "image": IMAGE, "caption": pa.string()} | types
        out = []
        for i, change in enumerate(changes or ({},)):
            fields = {"id": f"{name}-{i}", "image": {"bytes": JPG, "path": "a.jpg"}}
            fields |= {"caption": f"a wall, {name}"} | change
            out.append({k: v for k, v in fields.items() if k in known})
        return table(out, {k: t for k, t in known.items() if t is not ...}, row_group_size=2)

    return make


def _cut(name: str) -> bytes:
    return rows()(name)[:-100]


def _broken_page(name: str) -> bytes:
    """The footer and the first row group are whole; the second's pictures are not."""
    data = bytearray(rows({}, {}, {}, {})(name))
    file = pq.ParquetFile(io.BytesIO(bytes(data)))
    column = file.metadata.row_group(1).column(1)
    start = column.dictionary_page_offset or column.data_page_offset
    data[start : start + 64] = b"\xff" * 64
    return bytes(data)


def _latin1(name: str) -> bytes:
    """Strings that Arrow was told are UTF-8, and are not."""
    bad = pa.Array.from_buffers(pa.string(), 2, pa.array([b"B\xe4r", b"a wall"]).buffers())
    image = pa.array([{"bytes": JPG, "path": None}] * 2, IMAGE)
    ids = pa.array([f"{name}-0", f"{name}-1"])
    out = io.BytesIO()
    pq.write_table(pa.table({"id": ids, "image": image, "caption": bad}), out)
    return out.getvalue()


def _of_bytes(value: bytes | None) -> dict:
    return {"image": {"bytes": value, "path": "a.jpg"}}


_LIST = pa.list_(pa.string())
BROKEN = "file: truncated or broken"
CASES = [
    ("pq_plain", rows({}, {}, {}), [GOOD] * 3),
    ("pq_bytes_column", rows({"image": JPG}, image=pa.binary()), GOOD),
    ("pq_large_binary", rows({"image": JPG}, image=pa.large_binary()), GOOD),
    ("pq_captions_list", rows({"caption": ["a wall", "red"]}, caption=_LIST), GOOD),
    ("pq_captions_nulls", rows({"caption": [None, "red"]}, caption=_LIST), GOOD),
    ("pq_number_id", rows({"id": 123456789}, id=pa.int64()), GOOD),
    (
        "pq_palette",
        rows(_of_bytes(scenes.encoded("PNG", scenes.scene().convert("P")))),
        GOOD,
    ),
    ("pq_null_image", rows({"image": None}, {}), ["image: missing", GOOD]),
    ("pq_null_bytes", rows(_of_bytes(None)), "image: missing"),
    ("pq_zero_bytes", rows(_of_bytes(b"")), "image: 0 bytes"),
    ("pq_cut_image", rows(_of_bytes(JPG[:800])), "image: truncated or broken"),
    ("pq_text_image", rows(_of_bytes(b"404: not found, sorry")), "image: not JPEG, PNG or WebP"),
    ("pq_bomb", rows(_of_bytes(scenes.bomb(30_000, 4_000))), "image: too many pixels"),
    ("pq_path_image", rows({"image": "a.jpg"}, image=pa.string()), "image: missing"),
    ("pq_number_image", rows({"image": 3}, image=pa.int64()), "image: neither path nor bytes"),
    ("pq_nan_image", rows({"image": float("nan")}, image=pa.float64()), "image: missing"),
    (
        "pq_two_images",
        rows({"image": [{"bytes": JPG, "path": "a"}] * 2}, image=pa.list_(IMAGE)),
        "image: more than one",
    ),
    ("pq_no_images", rows({"image": []}, image=pa.list_(IMAGE)), "image: missing"),
    ("pq_null_in_images", rows({"image": [None]}, image=pa.list_(IMAGE)), "image: missing"),
    ("pq_no_image_column", rows(image=...), "image: missing"),
    ("pq_null_caption", rows({"caption": None}), "caption: missing"),
    ("pq_empty_caption", rows({"caption": " "}), "caption: empty"),
    ("pq_number_caption", rows({"caption": 4}, caption=pa.int32()), "caption: not text"),
    ("pq_nan_caption", rows({"caption": float("nan")}, caption=pa.float64()), "caption: missing"),
    ("pq_bool_caption", rows({"caption": True}, caption=pa.bool_()), "caption: not text"),
    ("pq_no_captions", rows({"caption": []}, caption=_LIST), "caption: missing"),
    ("pq_long_caption", rows({"caption": "x" * (MAX_CHARS + 1)}), "caption: too long"),
    ("pq_control_caption", rows({"caption": "a \x01 wall"}), "caption: control characters"),
    ("pq_no_caption_column", rows(caption=...), "caption: missing"),
    ("pq_latin1", _latin1, ["row: not UTF-8", GOOD]),
    ("pq_same_id", rows({"id": "pq_same_id"}, {"id": "pq_same_id"}), [GOOD, "id: duplicate"]),
    ("pq_float_id", rows({"id": 0.5}, id=pa.float64()), "id: neither text nor number"),
    ("pq_no_rows", lambda name: table([], {"image": IMAGE, "caption": pa.string()}), "file: empty"),
    ("pq_empty_file", lambda name: b"", BROKEN),
    ("pq_no_parquet", lambda name: b"image,caption\na.jpg,a wall\n", BROKEN),
    ("pq_cut", _cut, BROKEN),
    ("pq_broken_page", _broken_page, [GOOD, GOOD, BROKEN]),
]


def write(folder: Path) -> None:
    for name, make, _ in CASES:
        (folder / f"{name}.parquet").write_bytes(make(name))
