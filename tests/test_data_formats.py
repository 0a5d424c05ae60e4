"""Kinds and layouts of records that formats hold besides their usual one."""

from __future__ import annotations

import json
import os
import types
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import bad_tars, scenes

from janusflow_jax.config.errors import DataError
from janusflow_jax.data import sources
from janusflow_jax.data.prepare import build, engines, inputs, parquet
from janusflow_jax.data.prepare.inputs import Skipped
from janusflow_jax.data.prepare.records import Options

TAG = "<image_placeholder>"
TURNS = [{"from": "human", "value": "<image><image>\nSame?"}, {"from": "gpt", "value": "Yes."}]


def prepared(form: str, path, out, **options) -> list[dict]:
    build.prepare(Options(form, (str(path),), **options), out, engines.local(1))
    source = sources.open_source(out, "train")
    return [source[i] for i in range(len(source))]


def test_a_tar_of_conversations_and_one_of_documents(tmp_path):
    first, second = scenes.encoded(quality=80), scenes.encoded(quality=81)
    pictures = [("a.1.jpg", second), ("a.0.jpg", first)]
    talk = [*pictures, ("a.json", json.dumps({"conversations": TURNS, "image": "x"}).encode())]
    (tmp_path / "talk.tar").write_bytes(bad_tars.tar(*talk))
    (got,) = prepared("webdataset", tmp_path / "talk.tar", tmp_path / "1", kind="conversation")
    assert got["images"] == [first, second]
    assert got["conversation"]["content"] == [f"{TAG}{TAG}\nSame?", "Yes."]
    text = [*pictures, ("a.json", b'{"text": "One <image> two <image> three"}')]
    (tmp_path / "text.tar").write_bytes(bad_tars.tar(*text))
    (got,) = prepared("webdataset", tmp_path / "text.tar", tmp_path / "2", kind="document")
    assert got["images"] == [first, second] and got["text"] == f"One {TAG} two {TAG} three"


IMAGE = {"bytes": scenes.encoded(), "path": None}


@pytest.mark.parametrize(
    ("row", "kind", "holds"),
    [
        ({"image": IMAGE, "caption": "a wall"}, "captions", {"captions": ["a wall"]}),
        ({"jpg": scenes.encoded(), "txt": "a wall"}, "captions", {"captions": ["a wall"]}),
        ({"image": IMAGE, "text": ["a wall", "red"]}, "captions", {"captions": ["a wall", "red"]}),
        ({"text": "a long text", "url": "https://example.org"}, "text", {"text": "a long text"}),
        ({"images": [IMAGE, IMAGE], "conversations": TURNS}, "conversation", {}),
        (
            {
                "images": [IMAGE, IMAGE],
                "messages": [
                    {"role": "user", "content": "<image><image>\nSame?"},
                    {"role": "assistant", "content": "Yes."},
                ],
            },
            "conversation",
            {},
        ),
        (
            {
                "images": [IMAGE, IMAGE],
                "messages": [
                    {
                        "role": "user",
                        "content": [
                            {"type": "image", "text": None},
                            {"type": "image", "text": None},
                            {"type": "text", "text": "Same?"},
                        ],
                    },
                    {"role": "assistant", "content": [{"type": "text", "text": "Yes."}]},
                ],
            },
            "conversation",
            {},
        ),
        (
            {
                "images": [IMAGE],
                "texts": [
                    {"user": "What?", "assistant": "A wall.", "source": "x"},
                    {"user": "Sure?", "assistant": "Yes.", "source": "x"},
                ],
            },
            "conversation",
            {},
        ),
    ],
)
def test_columns_of_hugging_face(row, kind, holds, tmp_path):
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "a.parquet")
    assert parquet.guess_kind([str(tmp_path)]) == kind
    (got,) = prepared("parquet", tmp_path, tmp_path / "out", kind=kind)
    assert got["id"] == "a.parquet-0"
    assert holds.items() <= got.items()
    if kind == "captions":
        assert got["image"] == scenes.encoded()
    if kind == "conversation":
        roles, contents = got["conversation"]["role"], got["conversation"]["content"]
        assert roles == ["user", "assistant"] * (len(roles) // 2)
        assert contents[-1] == "Yes." and contents[0].endswith("?")
        assert sum(c.count(TAG) for c in contents) == len(got["images"]) == len(row["images"])


def test_documents_in_parts_as_obelics_has_them(tmp_path):
    row = {"images": [None, IMAGE, None, IMAGE], "texts": ["One", None, "two", None]}
    schema = pa.schema(
        [
            ("images", pa.list_(pa.struct([("bytes", pa.binary())]))),
            ("texts", pa.list_(pa.string())),
        ]
    )
    rows = [row, {"images": [IMAGE], "texts": ["No", "place"]}]
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), tmp_path / "a.parquet")
    (got,) = prepared("parquet", tmp_path, tmp_path / "out", kind="document")
    assert got["text"] == f"One\n{TAG}\ntwo\n{TAG}" and len(got["images"]) == 2


def test_named_columns_go_before_the_usual_names(tmp_path):
    row = {"image": b"x", "shot": scenes.encoded(), "text": "a page", "alt": "a wall", "nr": 7}
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "a.parquet")
    fields = {"image_field": "shot", "text_field": "alt", "id_field": "nr"}
    (got,) = prepared("parquet", tmp_path, tmp_path / "out", **fields)
    assert (got["id"], got["captions"]) == ("7", ["a wall"])
    assert scenes.encoded() == got["image"]


def test_a_new_format_is_one_module_and_one_line(tmp_path, monkeypatch):
    def plan(options, slices):
        return [{"path": str(p), "name": n} for p, n in inputs.files(options.inputs, (".new",))]

    def read(shard, options):
        for number, line in enumerate(Path(shard["path"]).read_text().splitlines()):
            if line == "end":
                raise Skipped("file: truncated or broken")
            place = f"{shard['name']}-{number}"
            yield place, place, Skipped("line: bad") if line == "bad" else {"text": line}

    module = types.SimpleNamespace(plan=plan, read=read, KINDS=("text",))
    monkeypatch.setitem(build.FORMATS, "new", module)
    (tmp_path / "a.new").write_text("one\nbad\n\nthree\nend\nfour")
    got = prepared("new", tmp_path, tmp_path / "out", kind="text")
    assert [(r["id"], r["text"]) for r in got] == [("a.new-0", "one"), ("a.new-3", "three")]
    skipped = json.loads((tmp_path / "out" / "report.json").read_text())["skipped"]
    assert skipped["line: bad"]["examples"] == [["a.new-1", ""]] and "text: empty" in skipped
    assert skipped["file: truncated or broken"]["examples"] == [["a.new", ""]]


@pytest.mark.slow
def test_a_dead_worker_is_an_error_with_advice():
    with pytest.raises(DataError, match="fewer `workers`"):
        list(engines.local(2)(os._exit, [1, 1]))
